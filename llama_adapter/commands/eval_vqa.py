"""Score an adapter's answers to questions about pictures: python -m eval.vqa --adapter DIR --data FOLDER"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from llama_adapter.commands.arguments import Parser, add_json_option, positive_int, report
from llama_adapter.commands.picture_options import add_picture_scoring_options, load_records_to_score
from llama_adapter.common.errors import UsageError


def main(words: Sequence[str] | None = None, *, program: str = "python -m eval.vqa") -> None:
    parser = Parser(prog=program, description=__doc__)
    add_picture_scoring_options(parser, default_split="test")
    parser.add_argument("--max-new-tokens", type=positive_int, default=16, help="tokens of an answer (16)")
    add_json_option(parser)
    arguments = parser.parse_args(words)

    # Slow to import, and not needed to refuse a wrong option.
    from llama_adapter.answering.records_answered import answer_records
    from llama_adapter.answering.scoring import accuracy_interval, is_right, normalise_answer, question_type
    from llama_adapter.common.progress import RowProgress
    from llama_adapter.data.choosing import shuffle_pictures

    to_score = load_records_to_score(arguments)
    records = to_score.records
    blind = [dataclasses.replace(record, images=()) for record in records]
    missing = ""
    if not to_score.features:
        print("the adapter can't see pictures: whatever is shown, its answers are the same")
        conditions = {"adapter": blind}
    else:
        conditions = {"adapter": records}
        try:
            conditions["picture of another row"] = shuffle_pictures(records, seed=arguments.seed)
        except UsageError as error:
            missing = f"control missing: picture of another row: {error}"
        conditions["no picture"] = blind
    kinds = [question_type(record.turns[-2].text, record.turns[-1].text) for record in records]
    right: dict[str, list[bool]] = {}
    for name, asked in conditions.items():
        # A question about the same pictures is asked only once.
        distinct = {(record.turns[:-1], record.images): record for record in asked}
        answers = answer_records(
            to_score.model,
            list(distinct.values()),
            features=to_score.features,
            max_new_tokens=arguments.max_new_tokens,
            beams=arguments.beams,
            batch_size=arguments.batch_size,
            progress=RowProgress(name, len(distinct)),
        )
        said = dict(zip(distinct, answers, strict=True))
        right[name] = [is_right(said[r.turns[:-1], r.images], r.turns[-1].text) for r in asked]

    places = defaultdict(list)
    for place, kind in enumerate(kinds):
        places[kind].append(place)
    print(f"\n{'':<24}" + "".join(f"{name:>12}" for name in ["all", *sorted(places)]))
    for name, marks in right.items():
        shares = [sum(marks) / len(marks)]
        shares += [sum(marks[i] for i in places[kind]) / len(places[kind]) for kind in sorted(places)]
        print(f"{name:<24}" + "".join(f"{share:>12.1%}" for share in shares))
    print(
        f"{'rows':<24}"
        + "".join(f"{n:>12,}" for n in [len(kinds), *(len(places[k]) for k in sorted(places))])
    )
    wanted = [normalise_answer(record.turns[-1].text) for record in records]
    sides = []
    for side in ("yes", "no"):
        marks = [mark for mark, answer in zip(right["adapter"], wanted, strict=True) if answer == side]
        if marks:
            sides.append(f"where the answer is {side}: {sum(marks) / len(marks):.1%} of {len(marks):,}")
    if sides:  # an adapter that always says yes is right as often as the answer is yes
        print(f"right {'; '.join(sides)}")
    if missing:
        print(missing)
    low, high = accuracy_interval(sum(right["adapter"]), len(records))
    print(f"95 % interval of the adapter's accuracy (beams {arguments.beams}): {low:.1%} to {high:.1%}")
    figures = {
        "accuracy": sum(right["adapter"]) / len(records),
        "accuracy_shuffled": sum(right.get("picture of another row", right["adapter"])) / len(records),
        "accuracy_no_image": sum(right.get("no picture", right["adapter"])) / len(records),
        "rows": len(records),
    }
    if missing:
        del figures["accuracy_shuffled"]
    report(figures, arguments.json)
