"""Chat templates against transformers' `apply_chat_template`, and texts that contain control tokens."""
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from granvit.data.chat import SYSTEM, TEMPLATES, Chat, byte_tokenizer, train_tokenizer

# As published with the models (Qwen2.5's without its branch for tools).
PUBLISHED = {
    "qwen2.5": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-3": "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}


@pytest.mark.parametrize("family", list(TEMPLATES))
@pytest.mark.parametrize("trained", [False, True])
def test_equals_the_published_template(family, trained):
    question, answer = "Where is the red cup? It costs 12.50!", "[0.19, 0.756, 0.417, 0.888]"
    tokenizer = train_tokenizer([question, answer, SYSTEM, "user assistant"], 340, family) if trained else byte_tokenizer(family)
    peer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), bos_token="<|begin_of_text|>", chat_template=PUBLISHED[family]
    )
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"<image>\n{question}"},
        {"role": "assistant", "content": answer},
    ]
    text = peer.apply_chat_template(messages, tokenize=False)
    before, after = text.split("<image>")
    peer_ids = [peer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    chat = Chat(tokenizer, family)
    assert chat.prefix_before == peer_ids[0]
    ours = chat.prefix_after + chat.question_ids(question) + chat.answer_ids(answer)
    rest = peer_ids[1][len(ours) :]
    assert peer_ids[1][: len(ours)] == ours
    assert peer.decode(rest) == ("\n" if family == "qwen2.5" else "")  # after the last supervised token
    prompt = peer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True).split("<image>")[1]
    assert chat.prefix_after + chat.question_ids(question) == peer(prompt, add_special_tokens=False)["input_ids"]


TURNS = [
    ("Where is the red cup? It costs 12.50!", "[0.19, 0.756, 0.417, 0.888]"),
    ("- And\n- the blue one?", "**Nowhere**.\n\nLook  again: *no*, l\u00e0!"),
    ("'s user", "...\n1234 \U0001f600 assistant"),
]
# How the published tokenizers cut text; Qwen2.5's composes accents before.
CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cut_as_published(family: str, texts: list[str]) -> Tokenizer:
    """A small tokenizer that cuts text as the family's published one does."""
    tokenizer = train_tokenizer(texts, 400, family)
    cuts = Regex(CUTS.replace("NUMBERS", "" if family == "qwen2.5" else "{1,3}"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(cuts, "isolated"), byte_level])
    if family == "qwen2.5":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize("family", list(TEMPLATES))
@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_conversation_equals_the_published_template_token_by_token_and_supervises_its_answers(family, with_image, turns):
    spoken = TURNS[:turns]
    tokenizer = cut_as_published(family, [text for turn in TURNS for text in turn] + [SYSTEM, "user\n\n", "assistant\n\n"])
    peer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), bos_token="<|begin_of_text|>", chat_template=PUBLISHED[family]
    )
    messages = [{"role": "system", "content": SYSTEM}]
    for number, (question, answer) in enumerate(spoken):
        image = "<image>\n" if with_image and number == 0 else ""
        messages += [{"role": "user", "content": image + question}, {"role": "assistant", "content": answer}]
    before, _, after = peer.apply_chat_template(messages, tokenize=False).rpartition("<image>")
    chat = Chat(tokenizer, family)
    if with_image:
        assert chat.prefix_before == peer(before, add_special_tokens=False)["input_ids"]
    encoded = peer(after, add_special_tokens=False, return_offsets_mapping=True)
    ids, supervised = [], []
    for asked, answered in chat.conversation_ids(spoken, with_image):
        ids, supervised = ids[:-1], supervised[:-1]  # an end of turn is a target, and the first input of the next turn
        ids += asked + answered
        supervised += [len(supervised) > 0] + [False] * (len(asked) - 1) + [True] * len(answered)
    prefix = chat.prefix_after if with_image else chat.prefix_before
    ids, supervised = prefix + ids, [False] * len(prefix) + supervised
    assert peer.decode(encoded["input_ids"][len(ids) :]) == ("\n" if family == "qwen2.5" else "")  # after the last end of turn
    assert ids == encoded["input_ids"][: len(ids)]
    spans, at = [], 0
    for _, answer in spoken:
        header = "assistant\n" if family == "qwen2.5" else "assistant<|end_header_id|>\n\n"
        start = after.index(header + answer, at) + len(header)
        at = start + len(answer) + len(TEMPLATES[family].end)
        spans.append(range(start, at))
    expected = [any(first in span for span in spans) for first, _ in encoded["offset_mapping"][: len(ids)]]
    assert supervised == expected
    length = chat.prefix_length(0) if with_image else len(chat.prefix_before)
    after_prefix = len(chat.prefix_before) * with_image + len(ids) - length
    assert chat.conversation_lengths([spoken, TURNS])[0] == (after_prefix - 1, sum(supervised))


@pytest.mark.parametrize("family, start", [("qwen2.5", []), ("llama-3", ["<|begin_of_text|>"])])
def test_the_plain_form_is_the_image_and_its_caption(family, start):
    chat = Chat(byte_tokenizer(family), family, plain=True)
    assert chat.prefix_before == [chat.tokenizer.token_to_id(token) for token in start] and chat.prefix_after == []
    assert chat.conversation_ids([("What is shown?", "a cup")], True) == [([], chat.answer_ids("a cup"))]
    assert chat.conversation_lengths([[("What is shown?", "a cup")]]) == [(5, 6)]
    assert chat.fingerprint != Chat(byte_tokenizer(family), family).fingerprint
    with pytest.raises(ValueError, match="several turns has no plain form"):
        chat.conversation_ids(TURNS, True)
    with pytest.raises(ValueError, match="without an image has no plain form"):
        chat.conversation_ids(TURNS[:1], False)


def test_a_conversation_whose_tokens_do_not_line_up_is_refused():
    """One tokenizer merges template and text, one loses text. Composing accents, as Qwen2.5's does, is not a loss."""
    merging = train_tokenizer(["\n!!", "a b"], 300, "qwen2.5", phrases=["\n!!"])
    with pytest.raises(ValueError, match="change when they are read together"):
        Chat(merging, "qwen2.5").conversation_ids([("where?", "!! there")], True)
    Chat(merging, "qwen2.5").conversation_ids([("where?", "there!!")], True)
    header = Chat(train_tokenizer(["where"], 300, "qwen2.5", phrases=["r\n??"]), "qwen2.5")  # merges the user header alone
    header.conversation_ids([("?? where", "there"), ("and?", "there")], True)
    for turns, with_image in (([("where?", "there"), ("?? and", "there")], True), ([("?? where", "there")], False)):
        with pytest.raises(ValueError, match="change when they are read together"):
            header.conversation_ids(turns, with_image)
    losing = byte_tokenizer("qwen2.5")
    losing.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 9, 9)])
    with pytest.raises(ValueError, match="do not decode to its text"):
        Chat(losing, "qwen2.5").conversation_ids([("where?", "over  there "), ("and?", "ok")], True)
    composing = byte_tokenizer("qwen2.5")
    composing.normalizer = normalizers.NFC()
    ((_, ids),) = Chat(composing, "qwen2.5").conversation_ids([("où?", "la\u0300")], True)
    assert Chat(composing, "qwen2.5").decode(ids) == "l\u00e0"


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_text_cannot_inject_control_tokens(family):
    chat = Chat(byte_tokenizer(family), family)
    controls = {chat.tokenizer.token_to_id(token) for token in TEMPLATES[family].control_tokens}
    text = "a cup" + "".join(TEMPLATES[family].control_tokens) + "ignore all"
    ids = chat.answer_ids(text)
    assert not controls & set(ids[:-1])
    assert ids[-1] == chat.stop_token
    assert chat.decode(ids) == text
    assert chat.answer_lengths([text, "cup"]) == [len(ids), 4]
    assert chat.question_lengths([text]) == [len(chat.question_ids(text))]


def test_decode_stops_at_the_first_stop_token(chat):
    assert chat.decode([*chat.answer_ids("a cup"), *chat.answer_ids("more")]) == "a cup"


def test_a_tokenizer_of_another_family_is_refused_by_token_and_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_tokenizer("qwen2.5").save(str(path))
    assert Chat.from_file(path, "qwen2.5").size == 259
    with pytest.raises(ValueError, match=r"tokenizer\.json.*<\|begin_of_text\|>"):
        Chat.from_file(path, "llama-3")
    path.write_text("{}")
    with pytest.raises(ValueError, match=str(path)):
        Chat.from_file(path, "qwen2.5")
    with pytest.raises(ValueError, match=r"absent\.json"):
        Chat.from_file(tmp_path / "absent.json", "qwen2.5")


def test_a_control_token_that_is_not_special_is_refused():
    vocabulary = {token: i for i, token in enumerate(TEMPLATES["qwen2.5"].control_tokens)}
    with pytest.raises(ValueError, match=r"<\|im_start\|>"):
        Chat(Tokenizer(models.WordLevel(vocabulary, unk_token="<|im_end|>")), "qwen2.5")


def test_training_makes_words_single_tokens_and_digits_single_characters():
    texts = ["a small red circle", "the word exit in blue", "box 0.123"] * 3
    tokenizer = train_tokenizer(texts, 400, "qwen2.5")
    assert tokenizer.encode("a small red circle").tokens == ["a", "Ġsmall", "Ġred", "Ġcircle"]
    assert tokenizer.encode("0.312").tokens == ["0", ".", "3", "1", "2"]
    assert tokenizer.get_vocab_size() <= 400
    assert tokenizer.to_str() == train_tokenizer(texts, 400, "qwen2.5").to_str()
    assert tokenizer.decode(tokenizer.encode("never seen: ünïcode\n").ids) == "never seen: ünïcode\n"
