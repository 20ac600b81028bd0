"""How far a sync is, in texts."""

import random

from embeddings_pipeline.orchestration.progress import TextMeter


def test_the_total_is_what_is_wanted_of_embedded_batches_and_guessed_of_the_others() -> None:
    told: list[tuple[str, int, int]] = []
    meter = TextMeter(lambda *what: told.append(what))
    meter.expect(4)
    meter.tell("reading")
    for batch, texts in enumerate([10, 20, 30]):
        meter.batch_done("item_texts", batch, {"texts": texts})
    meter.count(3)
    meter.batch_done("embeddings_384", 0, {"embedded": 5, "reused": 5})
    meter.batch_done("item_texts", 1, {"texts": 40})  # a run of it began anew
    meter.batch_done("embeddings_384", 1, {"embedded": 10, "quarantined": 10, "reused": 20})
    assert told == [
        ("reading", 0, 0),
        ("embedding", 0, 40),
        ("embedding", 0, 60),
        ("embedding", 0, 80),
        ("embedding", 3, 80),
        ("embedding", 5, 40),  # of ten texts in the first batch, five were wanted
        ("embedding", 5, 53),
        ("embedding", 25, 53),  # 25 of 50, and half of the other 30 and of the fourth batch's 26 or so
    ]


def test_a_batch_that_is_done_again_counts_once() -> None:
    chance, seen = random.Random(0), dict[int, tuple[int, int]]()
    last: list[tuple[str, int, int]] = []
    meter = TextMeter(lambda *what: last.append(what))
    meter.expect(20)
    for _ in range(500):
        batch, texts = chance.randrange(20), chance.randrange(1, 50)
        wanted = chance.randrange(texts)
        seen[batch] = texts, wanted
        meter.batch_done("item_texts", batch, {"texts": texts})
        meter.batch_done("embeddings_384", batch, {"embedded": wanted, "reused": texts - wanted})
        done = sum(wanted for _, wanted in seen.values())
        assert last[-1][1] == done
    assert last[-1][2] == done
