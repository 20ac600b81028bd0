-- What the same people liked, written anew as a whole.


-- name: stage
CREATE TEMPORARY TABLE new_cooccurrence (item_key text NOT NULL, other_key text NOT NULL, score real NOT NULL) ON COMMIT DROP


-- name: stage_liked
CREATE TEMPORARY TABLE new_liked (item_key text NOT NULL, people bigint NOT NULL) ON COMMIT DROP


-- name: lock
-- Of two that write at the same time the other one waits. Parameter: collection.

SELECT FROM embeddings.collection WHERE name = %(collection)s FOR NO KEY UPDATE


-- name: replace
-- Parameter: collection.

WITH gone AS (
    DELETE FROM embeddings.cooccurrence AS there
    WHERE there.collection = %(collection)s
      AND NOT EXISTS (SELECT FROM new_cooccurrence AS new
                      WHERE new.item_key = there.item_key AND new.other_key = there.other_key)
)
INSERT INTO embeddings.cooccurrence AS there (collection, item_key, other_key, score)
SELECT %(collection)s, item_key, other_key, score FROM new_cooccurrence
ON CONFLICT (collection, item_key, other_key) DO UPDATE SET score = excluded.score WHERE there.score <> excluded.score


-- name: replace_liked
-- Parameter: collection.

WITH gone AS (
    DELETE FROM embeddings.liked AS there
    WHERE there.collection = %(collection)s
      AND NOT EXISTS (SELECT FROM new_liked AS new WHERE new.item_key = there.item_key)
)
INSERT INTO embeddings.liked AS there (collection, item_key, people)
SELECT %(collection)s, item_key, people FROM new_liked
ON CONFLICT (collection, item_key) DO UPDATE SET people = excluded.people WHERE there.people <> excluded.people


-- name: is_built
-- Parameter: collection.

SELECT EXISTS (SELECT FROM embeddings.liked WHERE collection = %(collection)s)
