-- Texts that are longer than a model reads, so that their ends count for nothing.
-- {text}: the collection's texts.


-- name: note
-- The model's row is held meanwhile, so that no row outlives it. Parameters: collection, fingerprint, content_hashes and
-- tokens (arrays).

INSERT INTO embeddings.truncated (collection, fingerprint, content_hash, tokens)
SELECT model.collection, model.fingerprint, noted.content_hash, noted.tokens
FROM (SELECT collection, fingerprint FROM embeddings.model
      WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s FOR KEY SHARE) AS model
CROSS JOIN unnest(%(content_hashes)s::bytea[], %(tokens)s::bigint[]) AS noted (content_hash, tokens)
ON CONFLICT (collection, fingerprint, content_hash) DO UPDATE SET noted_at = now()
WHERE truncated.noted_at < now() - interval '1 day'


-- name: count
-- Live texts, those of them that are too long, the longest in tokens, and whether all were looked at. Parameters:
-- collection, fingerprint.

SELECT
    (SELECT count(*) FROM {text} WHERE NOT blank) AS texts,
    count(*) AS truncated,
    coalesce(max(noted.tokens), 0) AS longest,
    coalesce((SELECT lengths_known FROM embeddings.model
              WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s), true) AS known
FROM embeddings.truncated AS noted
JOIN {text} AS text ON text.content_hash = noted.content_hash
WHERE noted.collection = %(collection)s AND noted.fingerprint = %(fingerprint)s


-- name: texts
-- Each text once, to be looked at.

SELECT DISTINCT ON (content_hash) content_hash, text FROM {text} WHERE NOT blank ORDER BY content_hash


-- name: known
-- Every text of the model was looked at. Parameters: collection, fingerprint.

UPDATE embeddings.model SET lengths_known = true WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s


-- name: forget
-- What is no longer a text of the collection, and was not about to become one. Parameter: collection.

DELETE FROM embeddings.truncated AS noted
WHERE noted.collection = %(collection)s AND noted.noted_at < now() - interval '30 days'
  AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.content_hash = noted.content_hash)
