-- What models have answered, and who is asking about what. A text is its content hash under a fingerprint.


-- name: known
-- Parameters: fingerprint, hashes.

SELECT content_hash, embedding FROM embeddings.embedding_cache
WHERE fingerprint = %(fingerprint)s AND content_hash = ANY (%(hashes)b::bytea[])


-- name: known_hashes
-- As `known`, without the vectors; each has to have this many bytes. Parameters: fingerprint, hashes, bytes.

SELECT content_hash FROM embeddings.embedding_cache
WHERE fingerprint = %(fingerprint)s AND content_hash = ANY (%(hashes)b::bytea[]) AND octet_length(embedding) = %(bytes)s


-- name: put
-- In the order of the hashes, so that two who write the same do not wait for each other in a ring.
-- Parameters: fingerprint, hashes, embeddings.

INSERT INTO embeddings.embedding_cache (fingerprint, content_hash, embedding)
SELECT %(fingerprint)s, answer.hash, answer.embedding
FROM unnest(%(hashes)b::bytea[], %(embeddings)b::bytea[]) AS answer (hash, embedding)
ORDER BY answer.hash
ON CONFLICT (fingerprint, content_hash) DO UPDATE SET embedding = excluded.embedding, written_at = now()


-- name: sweep
-- Some of the answers that are older than this many days. A time that is yet to come is a clock's that was ahead, and
-- counts as now. Parameters: days, rows.

DELETE FROM embeddings.embedding_cache
WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM embeddings.embedding_cache
    WHERE written_at < now() - make_interval(days => %(days)s)
    LIMIT %(rows)s
))


-- name: sweep_claims
-- Claims that count no longer, which nobody has taken over. What batch jobs were refused is remembered for longer.

DELETE FROM embeddings.embedding_claim
WHERE until < now() - CASE WHEN refused THEN interval '30 days' ELSE interval '1 day' END


-- name: purge
-- All answers, or (fingerprints) those of some models; some at a time. Parameters: fingerprints, rows.

DELETE FROM embeddings.embedding_cache
WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM embeddings.embedding_cache
    WHERE %(fingerprints)s::text[] IS NULL OR fingerprint = ANY (%(fingerprints)s)
    LIMIT %(rows)s
))


-- name: statistics
-- By fingerprint: answers, their bytes, and when the first and the last was written.

SELECT fingerprint, count(*), sum(octet_length(embedding))::bigint, min(written_at), max(written_at)
FROM embeddings.embedding_cache GROUP BY fingerprint ORDER BY fingerprint


-- name: models
-- Which collections use a model, under which profile.

SELECT fingerprint, collection, profile ->> 'name' FROM embeddings.model ORDER BY fingerprint, collection


-- name: claim
-- Those of the texts that nobody is asking about, or whose lease has ended; one that is too long is a clock's that was
-- ahead. A batch job keeps its texts, but for those that were refused there, which stay noted as that.
-- Parameters: fingerprint, collection, holder, hashes, usd (one each), seconds.

INSERT INTO embeddings.embedding_claim AS claim (fingerprint, content_hash, collection, holder, usd, until)
SELECT %(fingerprint)s, wanted.hash, %(collection)s, %(holder)s, wanted.usd,
       now() + make_interval(secs => %(seconds)s)
FROM unnest(%(hashes)b::bytea[], %(usd)s::double precision[]) AS wanted (hash, usd)
ORDER BY wanted.hash
ON CONFLICT (fingerprint, content_hash) DO UPDATE
SET collection = excluded.collection, holder = excluded.holder, usd = excluded.usd, until = excluded.until
WHERE (claim.job IS NULL OR claim.refused)
  AND (claim.until < now() OR claim.until > excluded.until + interval '1 second')
RETURNING content_hash


-- name: in_jobs
-- Of these texts, those whose vectors are to come from a batch job. Parameters: fingerprint, hashes.

SELECT content_hash FROM embeddings.embedding_claim
WHERE fingerprint = %(fingerprint)s AND content_hash = ANY (%(hashes)b::bytea[]) AND job IS NOT NULL AND NOT refused


-- name: not_for_jobs
-- Of these texts, those that a batch job is not to have: another job has them, or was refused them.
-- Parameters: fingerprint, hashes.

SELECT content_hash FROM embeddings.embedding_claim
WHERE fingerprint = %(fingerprint)s AND content_hash = ANY (%(hashes)b::bytea[]) AND job IS NOT NULL


-- name: holders
-- Who is asking about these texts. Parameters: fingerprint, hashes.

SELECT DISTINCT holder FROM embeddings.embedding_claim
WHERE fingerprint = %(fingerprint)s AND content_hash = ANY (%(hashes)b::bytea[])
  AND (job IS NULL OR refused AND holder <> job)


-- name: prolong
-- Parameters: holder, seconds.

UPDATE embeddings.embedding_claim SET until = now() + make_interval(secs => %(seconds)s) WHERE holder = %(holder)s


-- name: release
-- Parameters: holder, fingerprint, hashes.

DELETE FROM embeddings.embedding_claim
WHERE fingerprint = %(fingerprint)s AND content_hash = ANY (%(hashes)b::bytea[]) AND holder = %(holder)s


-- name: release_all
-- What batch jobs were refused stays noted as that. Parameter: holder.

WITH refused AS (
    UPDATE embeddings.embedding_claim SET until = now() WHERE holder = %(holder)s AND refused
)
DELETE FROM embeddings.embedding_claim WHERE holder = %(holder)s AND NOT refused
