"""Score an adapter's captions: python -m eval.captions --adapter DIR --data FOLDER"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llama_adapter.commands.arguments import Parser, add_json_option, positive_int, report
from llama_adapter.commands.picture_options import add_picture_scoring_options, load_records_to_score
from llama_adapter.common.errors import UsageError


def main(words: Sequence[str] | None = None, *, program: str = "python -m eval.captions") -> None:
    parser = Parser(prog=program, description=__doc__)
    add_picture_scoring_options(parser, default_split="val")
    parser.add_argument("--max-new-tokens", type=positive_int, default=40, help="tokens at most (40)")
    parser.add_argument("--samples", type=int, default=5, help="captions that are shown (5)")
    add_json_option(parser)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.answering.records_answered import answer_records
    from llama_adapter.answering.scoring import caption_scores
    from llama_adapter.common.progress import RowProgress
    from llama_adapter.data.choosing import shuffle_pictures
    from llama_adapter.data.records import Record
    from llama_adapter.data.templates import CAPTION_QUESTIONS, Turn

    to_score = load_records_to_score(arguments)
    if not to_score.features:
        raise UsageError("the adapter can't see pictures, so all its captions are the same; name another")
    references: dict[tuple[object, ...], list[str]] = {}
    rows: dict[tuple[object, ...], Record] = {}
    for record in to_score.records:
        if len(record.turns) != 2 or record.turns[0].text not in CAPTION_QUESTIONS:
            raise UsageError(f"{arguments.data}: row {record.row} holds no captions; score it with eval.vqa")
        references.setdefault(record.images, []).append(record.turns[-1].text)
        turns = (Turn("user", CAPTION_QUESTIONS[0]), record.turns[-1])
        rows.setdefault(record.images, dataclasses.replace(record, turns=turns))
    records = list(rows.values())
    captions = [references[record.images] for record in records]

    conditions, missing = {"adapter": records}, ""
    try:
        conditions["picture of another row"] = shuffle_pictures(records, seed=arguments.seed)
    except UsageError as error:
        missing = f"control missing: picture of another row: {error}"
    conditions["no picture"] = [dataclasses.replace(record, images=()) for record in records]
    scores, said = {}, {}
    for name, asked in conditions.items():
        # Without pictures all rows ask the same question, so one answer is enough.
        some = asked if asked[0].images else asked[:1]
        answers = answer_records(
            to_score.model,
            some,
            features=to_score.features,
            max_new_tokens=arguments.max_new_tokens,
            beams=arguments.beams,
            batch_size=arguments.batch_size,
            progress=RowProgress(name, len(some)),
        )
        said[name] = answers if len(answers) == len(records) else answers * len(records)
        scores[name] = caption_scores(said[name], captions)
    for record, answer, texts in list(zip(records, said["adapter"], captions, strict=True))[
        : arguments.samples
    ]:
        print(f"{record.images[0]!s}\n  adapter   {answer}\n  a person  {texts[0]}")
    print(f"\n{'':<24} {'CIDEr':>8} {'BLEU-4':>8}   ({len(records):,} pictures, beams {arguments.beams})")
    for name, score in scores.items():
        print(f"{name:<24} {score.cider:>8.3f} {score.bleu4:>8.3f}")
    figures = {"cider": scores["adapter"].cider, "bleu4": scores["adapter"].bleu4}
    if missing:
        print(missing)
    else:
        shuffled = scores["picture of another row"]
        figures |= {"cider_shuffled": shuffled.cider, "bleu4_shuffled": shuffled.bleu4}
    figures |= {"cider_no_image": scores["no picture"].cider, "rows": len(records)}
    report(figures, arguments.json)
