"""Chat templates, and the token ids of prefix, questions and supervised answers (with the `tokenizers` library).

A conversation is `{system turn}{user header}<image>\\n{Q}{end of turn}{assistant header}{A}{end of turn}`, and for every further
turn `{user header}{Q}{end of turn}{assistant header}{A}{end of turn}`. Everything before the first `{Q}` is the shared prefix: it
is the same for every question about one image. Only the answers and their end-of-turn tokens are supervised. The plain form,
which the projector is trained on, is `<image>{A}{end of turn}` (LLaVA's "plain").

The system message is LLaVA's and always written out; the default of Qwen2.5's own template is another. Control tokens come
from the templates of this file only: a caption that spells one out is encoded as ordinary text.
"""
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from granvit.config import RunConfig
from granvit.data import prompts
from granvit.models import LanguageConfig

SYSTEM = "You are a helpful assistant."
Piece = tuple[str, bool]  # text, and whether it is one control token
Turns = Sequence[tuple[str, str]]  # questions with their answers
TurnIds = list[tuple[list[int], list[int]]]  # for each turn: the ids before its answer, and the ids of its answer


def _turns(*pieces: str) -> tuple[Piece, ...]:
    return tuple((piece, piece.startswith("<|")) for piece in pieces)


@dataclass(frozen=True)
class Template:
    """The fixed parts of a conversation. `next_turn` comes between the end of an answer and the next question, `end` is the
    end-of-turn token, `pad` the padding token. The plain form has `start` before the image instead of `before_image`."""

    start: tuple[Piece, ...]
    before_image: tuple[Piece, ...]
    after_image: tuple[Piece, ...]
    after_question: tuple[Piece, ...]
    next_turn: tuple[Piece, ...]
    end: str
    pad: str

    @property
    def control_tokens(self) -> tuple[str, ...]:
        used = self.before_image + self.after_image + self.after_question + self.next_turn
        return tuple(dict.fromkeys([text for text, control in used if control] + [self.end, self.pad]))


TEMPLATES = {
    "qwen2.5": Template(
        start=(),
        before_image=_turns("<|im_start|>", f"system\n{SYSTEM}", "<|im_end|>", "\n", "<|im_start|>", "user\n"),
        after_image=_turns("\n"),
        after_question=_turns("<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
        next_turn=_turns("\n", "<|im_start|>", "user\n"),
        end="<|im_end|>",
        pad="<|endoftext|>",
    ),
    "llama-3": Template(
        start=_turns("<|begin_of_text|>"),
        before_image=_turns(
            *("<|begin_of_text|>", "<|start_header_id|>", "system", "<|end_header_id|>", f"\n\n{SYSTEM}", "<|eot_id|>"),
            *("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"),
        ),
        after_image=_turns("\n"),
        after_question=_turns("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"),
        next_turn=_turns("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"),
        end="<|eot_id|>",
        pad="<|end_of_text|>",
    ),
}

# `Chat.jinja` replaces <SYSTEM> etc. The end-of-turn token of a turn is part of the fixed text after it, as in `Template`.
JINJA = """\
{{- <SYSTEM> -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- <TO_USER> -}}
{%- elif message['role'] != 'assistant' -%}
{{- raise_exception('turns are those of user and assistant; the system message is part of the template') -}}
{%- endif -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- <IMAGE> -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' and (add_generation_prompt or not loop.last) -%}
{{- <TO_ASSISTANT> -}}
{%- elif loop.last -%}
{{- <END> -}}
{%- endif -%}
{%- endfor -%}
"""


class Chat:
    """Token ids of the shared prefix, of questions and of answers, for one tokenizer and one family of templates.

    `prefix_before` and `prefix_after` are the ids of the prefix before and after the image; `stop_token` ends an answer;
    `pad_token` fills image positions and padding. `origin` names the tokenizer in error messages. With `plain`, questions are
    left out: the answer follows the image. `ValueError` if the family is unknown, or the tokenizer lacks one of its control
    tokens or does not mark it special.
    """

    def __init__(self, tokenizer: Tokenizer, family: str, origin: str = "tokenizer", plain: bool = False):
        if family not in TEMPLATES:
            raise ValueError(f"chat family {family!r} is unknown; known: {', '.join(TEMPLATES)}")
        self.tokenizer, self.family, self.origin, self.plain = tokenizer, family, origin, plain
        self._template = TEMPLATES[family]
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # encode control tokens in a text as ordinary text
        self._control: dict[str, int] = {}
        for token in self._template.control_tokens:
            index = tokenizer.token_to_id(token)
            if index is None:
                raise ValueError(
                    f"{origin}: no token {token!r}, which the {family!r} chat template needs; this tokenizer belongs to "
                    f"another model, or the language model's `chat` should name another family"
                )
            if index in self._text(token):
                raise ValueError(f"{origin}: token {token!r} must be marked special in it, or a caption could contain it")
            self._control[token] = index
        if plain:
            self._template = replace(
                self._template, before_image=self._template.start, after_image=(), after_question=(), next_turn=()
            )
        self.stop_token = self._control[self._template.end]
        self.pad_token = self._control[self._template.pad]
        self.prefix_before = self._fixed(self._template.before_image)
        self.prefix_after = self._fixed(self._template.after_image)
        self._after_question = self._fixed(self._template.after_question)
        self._next_turn = [self.stop_token, *self._fixed(self._template.next_turn)]

    @classmethod
    def from_file(cls, path: str | Path, family: str, plain: bool = False) -> "Chat":
        """Reads a `tokenizer.json`; `ValueError` if the file is missing or is not a tokenizer."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer {path}: no such file; publishers ship it with the language model's weights")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer {path}: not a tokenizer.json: {error}") from None
        return cls(tokenizer, family, str(path), plain)

    def __reduce__(self):
        return Chat, (self.tokenizer, self.family, self.origin, self.plain)

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _fixed(self, pieces: Iterable[Piece]) -> list[int]:
        return [i for text, control in pieces for i in ([self._control[text]] if control else self._text(text))]

    @property
    def size(self) -> int:
        """The largest token id plus one: the smallest vocabulary that the decoder may have."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of a hash over all that determines token lengths: the contents of `contents_fingerprint` and the
        version of `tokenizers`."""
        return self._hashed(tokenizers.__version__)

    @property
    def contents_fingerprint(self) -> str:
        """Sixteen hex digits of a hash over the tokenizer, the template and the fixed wording."""
        return self._hashed()

    def _hashed(self, *more: str) -> str:
        wording = (prompts.BBOX2CAPTION, prompts.CAPTION2BBOX, prompts.GLOBAL)
        contents = (self.tokenizer.to_str(), self.family, repr(self._template), *wording, *more)
        return hashlib.sha256("\0".join(contents).encode()).hexdigest()[:16]

    def jinja(self, image_token: str) -> str:
        """The template as a `chat_template` of transformers: user and assistant turns, with `image_token` for each image.

        A tokenizer that parses control tokens encodes the rendered text to the same ids as this class, for questions that do not
        begin with white space. Images are moved to the start of their turn. Every user turn begins with the same header.
        """
        template = self._template
        text = lambda pieces: "".join(piece for piece, _ in pieces)  # noqa: E731
        first_end = [piece for piece, _ in template.before_image].index(template.end)
        written = {
            "SYSTEM": text(template.before_image[:first_end]),
            "TO_USER": text(template.before_image[first_end:]),
            "IMAGE": image_token + text(template.after_image),
            "TO_ASSISTANT": text(template.after_question),
            "END": template.end,
        }
        source = JINJA
        for name, value in written.items():
            source = source.replace(f"<{name}>", json.dumps(value))
        return source

    def prefix_length(self, image_tokens: int) -> int:
        """Number of tokens of the shared prefix with an image of `image_tokens` tokens."""
        return len(self.prefix_before) + image_tokens + len(self.prefix_after)

    def question_ids(self, text: str) -> list[int]:
        """`{Q}{end of turn}{assistant header}` (plain: empty); the output at its last token predicts the first answer token."""
        return [] if self.plain else self._text(text) + self._after_question

    def answer_ids(self, text: str) -> list[int]:
        """`{A}{end of turn}`: the supervised tokens."""
        return [*self._text(text), self.stop_token]

    def question_lengths(self, texts: Sequence[str]) -> list[int]:
        """`len(question_ids(text))` for each, encoded as a batch."""
        return [0] * len(texts) if self.plain else [n + len(self._after_question) for n in self._lengths(texts)]

    def answer_lengths(self, texts: Sequence[str]) -> list[int]:
        """`len(answer_ids(text))` for each, encoded as a batch."""
        return [n + 1 for n in self._lengths(texts)]

    def conversation_ids(self, turns: Turns, with_image: bool) -> TurnIds:
        """For each turn the ids before its answer, and `answer_ids` of the answer.

        The ids of the first turn begin after the prefix, those of a later turn with the end of turn of the answer before it.
        Template text, questions and answers are encoded separately. `ValueError` with the reason if encoding them together gives
        other ids, if an answer's ids do not decode to its text, or if the plain form cannot express the conversation.
        """
        if self.plain and not with_image:
            raise ValueError("a conversation without an image has no plain form")
        if self.plain and len(turns) > 1:
            raise ValueError("a conversation of several turns has no plain form")
        template, ids = self._template, []
        before = template.after_image if with_image else template.before_image
        for number, (question, answer) in enumerate(turns):
            answer_ids = self.answer_ids(answer)
            if self.tokenizer.decode(answer_ids[:-1], skip_special_tokens=False) != self._normalised(answer):
                raise ValueError("an answer's supervised tokens do not decode to its text")
            joints = [(template.after_question, answer)] + ([] if self.plain else [(before, question)])
            if not all(self._reads_apart(pieces, text) for pieces, text in joints):
                raise ValueError("a turn's tokens change when they are read together with the template before them")
            before = template.next_turn
            ids.append((self._next_turn * (number > 0) + self.question_ids(question), answer_ids))
        return ids

    def conversation_lengths(self, conversations: Sequence[Turns]) -> list[tuple[int, int]]:
        """For each conversation the number of input tokens after the prefix, and the number of supervised tokens.

        The last end-of-turn token is supervised, but not an input.
        """
        questions = iter(self.question_lengths([question for turns in conversations for question, _ in turns]))
        answers = iter(self.answer_lengths([answer for turns in conversations for _, answer in turns]))
        lengths = []
        for turns in conversations:
            question_tokens, answer_tokens = sum(islice(questions, len(turns))), sum(islice(answers, len(turns)))
            tokens_between = (len(turns) - 1) * (len(self._next_turn) - 1)  # its end-of-turn token is counted with the answer
            lengths.append((question_tokens + answer_tokens - 1 + tokens_between, answer_tokens))
        return lengths

    def _reads_apart(self, pieces: tuple[Piece, ...], text: str) -> bool:
        """Whether the last piece and `text`, encoded together, give the same ids as encoded separately."""
        if not pieces or pieces[-1][1]:
            return True
        return self._text(pieces[-1][0] + text) == self._text(pieces[-1][0]) + self._text(text)

    def _normalised(self, text: str) -> str:
        """The text after the tokenizer's normalisation (Qwen2.5's composes accents)."""
        return self.tokenizer.normalizer.normalize_str(text) if self.tokenizer.normalizer else text

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(e) for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids up to the first stop token, without control tokens."""
        answer_ids = []
        for index in map(int, ids):
            if index == self.stop_token:
                break
            answer_ids.append(index)
        return self.tokenizer.decode(answer_ids, skip_special_tokens=True)


def byte_tokenizer(family: str) -> Tokenizer:
    """A tokenizer with one token per byte value and the family's control tokens, for `model.init=random` without a tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(TEMPLATES[family].control_tokens))
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, family: str, phrases: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE trained on `texts`, with at most `vocab_size` ids including the family's control tokens.

    Words (with the space before them) become single tokens as far as `vocab_size` allows. Each digit is its own token, as in
    Qwen2.5's tokenizer, so that coordinates are encoded digit by digit. Each of `phrases` becomes one token; where several
    match, the longest is used.
    """
    pieces = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(phrases),
        min_frequency=1,
        special_tokens=list(TEMPLATES[family].control_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def load_chat(config: RunConfig, language: LanguageConfig) -> Chat:
    """The run's chat template with its tokenizer; with `model.init=random` and no tokenizer, with the built-in byte tokenizer.

    `ValueError` if the tokenizer is missing, does not fit the template, or has more ids than `language` embeds.
    """
    directory = Path(config.model.tokenizer or config.model.weights_language)
    path = directory if directory.suffix == ".json" else directory / "tokenizer.json"
    if path.is_file() or config.model.init != "random" or config.model.tokenizer:
        chat = Chat.from_file(path, language.chat, config.stage_spec.plain)
    else:
        chat = Chat(byte_tokenizer(language.chat), language.chat, "the built-in byte tokenizer", config.stage_spec.plain)
    if chat.size > language.vocab:
        raise ValueError(
            f"{chat.origin} has {chat.size} tokens, but {language.name!r} embeds {language.vocab} only; "
            f"set model.tokenizer to this model's tokenizer"
        )
    return chat
