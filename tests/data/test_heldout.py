"""Held-out questions in batches."""
from granvit.data.heldout import held_out
from granvit.data.prompts import format_box


def test_held_out_questions_come_in_one_shape_and_are_shared_among_ranks(store, records, vision, chat):
    tasks = ("bbox2caption", "caption2bbox")
    whole = list(held_out(store, tasks, chat, vision, 8, 10))
    assert len({prompts.token_ids_BS.shape for prompts, _ in whole}) == 1
    items = [item for _, part in whole for item in part]
    by_id = {record.id: record for record in records}
    chosen = {item[0] for item in items}
    assert len(items) == sum(2 * len(by_id[i].regions) for i in chosen) and 5 < len(chosen) <= 10
    for prompts, part in whole:
        for row, (record_id, task, question, reference, box) in enumerate(part):
            region = next(r for r in by_id[record_id].regions if r.box == box)
            assert reference == (region.caption if task == "bbox2caption" else format_box(box))
            ids = prompts.token_ids_BS[row, : prompts.lengths_B[row]].tolist()
            assert ids[chat.prefix_length(vision.patches) :] == chat.question_ids(question)
    ranks = [list(held_out(store, tasks, chat, vision, 8, 10, rank, 2)) for rank in (0, 1)]
    assert sorted(i for rank in ranks for _, part in rank for i in part) == sorted(items)
