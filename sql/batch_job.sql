-- Batch jobs: files of texts that a server answers within a day. A job lives until `ended_at` is set.
-- Parameter of many: id, the job's.


-- name: insert
-- Parameters: collection, fingerprint, profile, account, usd_per_million.

INSERT INTO embeddings.batch_job
    (id, collection, fingerprint, profile, account, batches, texts, tokens, usd_per_million, usd)
VALUES (%(id)s, %(collection)s, %(fingerprint)s, %(profile)s, %(account)s, '{}', 0, 0, %(usd_per_million)s, 0)


-- name: claim
-- Those of the texts that nobody has. Parameters: fingerprint, collection, hashes, tokens (one each).

INSERT INTO embeddings.embedding_claim AS claim
    (fingerprint, content_hash, collection, holder, job, tokens, until)
SELECT %(fingerprint)s, wanted.hash, %(collection)s, %(id)s, %(id)s, wanted.tokens, 'infinity'
FROM unnest(%(hashes)b::bytea[], %(tokens)s::bigint[]) AS wanted (hash, tokens)
ORDER BY wanted.hash
ON CONFLICT (fingerprint, content_hash) DO UPDATE
SET collection = excluded.collection, holder = excluded.holder, job = excluded.job, tokens = excluded.tokens,
    usd = 0, until = excluded.until
WHERE claim.job IS NULL AND claim.until < now()
RETURNING content_hash


-- name: claimed
-- How much a job has in all, and of which batches. Parameters: texts, tokens, usd, batches.

UPDATE embeddings.batch_job SET texts = %(texts)s, tokens = %(tokens)s, usd = %(usd)s, batches = %(batches)s
WHERE id = %(id)s


-- name: drop
-- A job that has no text after all.

DELETE FROM embeddings.batch_job WHERE id = %(id)s AND state = 'preparing'


-- name: uploaded
-- Written before the server is asked to begin it. Parameter: input_file.

UPDATE embeddings.batch_job SET state = 'uploaded', input_file = %(input_file)s, asked_at = now()
WHERE id = %(id)s AND state = 'preparing'
RETURNING id


-- name: asked
-- The server is asked once more to begin it.

UPDATE embeddings.batch_job SET asked_at = now() WHERE id = %(id)s AND state = 'uploaded' RETURNING id


-- name: submitted
-- Parameters: remote, remote_state.

UPDATE embeddings.batch_job
SET state = 'submitted', remote = %(remote)s, remote_state = %(remote_state)s, submitted_at = now(), looked_at = now()
WHERE id = %(id)s AND state = 'uploaded'


-- name: looked
-- What the server says of it. Parameters: state, remote_state, remote_done, output_file, error_file, reason.

UPDATE embeddings.batch_job
SET state = %(state)s, remote_state = %(remote_state)s, remote_done = %(remote_done)s, output_file = %(output_file)s,
    error_file = %(error_file)s, reason = %(reason)s, looked_at = now(), ended_at = NULL,
    missing_since = CASE WHEN batch_job.state = 'lost' THEN missing_since END  -- its files may be missing still
WHERE id = %(id)s AND state IN ('submitted', 'lost')


-- name: not_looked
-- Why nothing was learned of it. Parameter: reason.

UPDATE embeddings.batch_job SET looked_at = now(), reason = %(reason)s WHERE id = %(id)s


-- name: missing
-- The server says that there is no such job, or file of it; since when. Parameter: reason.

UPDATE embeddings.batch_job
SET looked_at = now(), missing_since = coalesce(missing_since, now()), reason = %(reason)s
WHERE id = %(id)s
RETURNING extract(epoch FROM now() - missing_since)::double precision


-- name: open_claims
-- Of these texts, those that the job still has, with their tokens. Parameter: hashes.

SELECT content_hash, tokens FROM embeddings.embedding_claim
WHERE holder = %(id)s AND NOT refused AND content_hash = ANY (%(hashes)b::bytea[])
FOR UPDATE


-- name: answered
-- Parameters: hashes, texts, billed_tokens, billed_usd.

WITH released AS (
    DELETE FROM embeddings.embedding_claim WHERE holder = %(id)s AND content_hash = ANY (%(hashes)b::bytea[])
)
UPDATE embeddings.batch_job
SET answered = answered + %(texts)s, billed_tokens = billed_tokens + %(billed_tokens)s,
    billed_usd = billed_usd + %(billed_usd)s
WHERE id = %(id)s


-- name: refused
-- Parameter: hashes.

WITH refused AS (
    UPDATE embeddings.embedding_claim SET refused = true, until = now()
    WHERE holder = %(id)s AND NOT refused AND content_hash = ANY (%(hashes)b::bytea[])
    RETURNING content_hash
)
UPDATE embeddings.batch_job SET refused = batch_job.refused + (SELECT count(*) FROM refused) WHERE id = %(id)s


-- name: end
-- The job has ended: what it still has is free again, and what it answered may be committed at once.
-- Parameters: state, reason.

WITH released AS (
    DELETE FROM embeddings.embedding_claim WHERE holder = %(id)s AND NOT refused
), ended AS (
    UPDATE embeddings.batch_job
    SET state = %(state)s, reason = %(reason)s, unanswered = greatest(0, texts - answered - refused), ended_at = now()
    WHERE id = %(id)s
    RETURNING collection, batches, answered
)
UPDATE embeddings.batch SET next_try = NULL
FROM ended
WHERE batch.collection = ended.collection AND batch.batch = ANY (ended.batches) AND ended.answered > 0


-- name: due
-- Jobs that are to be looked at: of a collection (NULL: of all), those that live, and for some weeks those that the server
-- had lost. Parameters: collection, seconds, lost_seconds: since the last look.

SELECT id FROM embeddings.batch_job
WHERE (%(collection)s::text IS NULL OR collection = %(collection)s)
  AND CASE
      WHEN ended_at IS NULL THEN coalesce(looked_at, '-infinity') < now() - make_interval(secs => %(seconds)s)
                              OR looked_at > now()  -- a clock that was ahead
      ELSE state = 'lost' AND made_at > now() - interval '30 days'
           AND looked_at < now() - make_interval(secs => %(lost_seconds)s)
  END
ORDER BY looked_at NULLS FIRST, made_at


-- name: refused_tokens
-- The tokens of the smallest job that a server refused lately since so many may not wait there, of those beside which no
-- other job waited there that was accepted, or larger. Parameters: account, model.

SELECT min(job.tokens) FROM embeddings.batch_job AS job
WHERE job.account = %(account)s AND job.profile ->> 'model' = %(model)s
  AND job.state = 'failed' AND job.reason LIKE 'token_limit_exceeded:%%' AND job.ended_at > now() - interval '7 days'
  AND NOT EXISTS (
      SELECT FROM embeddings.batch_job AS other
      WHERE other.id <> job.id AND other.account = job.account AND other.profile ->> 'model' = job.profile ->> 'model'
        AND other.submitted_at < job.ended_at AND coalesce(other.ended_at, 'infinity') > job.submitted_at
        AND (other.state <> 'failed' OR (other.tokens, other.id) > (job.tokens, job.id)))


-- name: get
-- One job, with the seconds since the server was last asked to begin it.

SELECT id, collection, fingerprint, profile, account, state, texts, usd_per_million, input_file, remote, remote_state,
       remote_done, output_file, error_file, reason, made_at,
       extract(epoch FROM now() - asked_at)::double precision AS asked_seconds
FROM embeddings.batch_job WHERE id = %(id)s


-- name: listed
-- Jobs of a collection (NULL: of all) that live, and those that ended in the last days; the newest first.
-- Parameters: collection, days.

SELECT id, collection, fingerprint, profile ->> 'name' AS profile, state, remote, remote_state, texts, remote_done,
       answered, refused, unanswered, tokens, usd, usd_per_million IS NOT NULL AS priced, billed_tokens, billed_usd,
       reason, cardinality(batches) AS batches, made_at, submitted_at, ended_at,
       extract(epoch FROM coalesce(ended_at, now()) - made_at)::double precision AS age_seconds
FROM embeddings.batch_job
WHERE (%(collection)s::text IS NULL OR collection = %(collection)s)
  AND (ended_at IS NULL OR ended_at > now() - make_interval(days => %(days)s))
ORDER BY made_at DESC, id


-- name: to_follow_up
-- By fingerprint, the batches of jobs that ended lately, since which no other job of theirs lives, with when their last job
-- was made. After jobs without any answer they wait, longer each time. Parameters: collection, days, first and longest (wait).

WITH ended AS (
    SELECT job.fingerprint, of.batch, max(job.made_at) AS made_at, max(job.ended_at) AS ended_at,
           bool_or(job.ended_at IS NULL) AS lives,
           count(*) FILTER (WHERE job.answered = 0 AND job.ended_at > now() - interval '1 day') AS failures,
           (array_agg(job.answered ORDER BY job.made_at DESC))[1] AS answered
    FROM embeddings.batch_job AS job
    CROSS JOIN LATERAL unnest(job.batches) AS of (batch)
    WHERE job.collection = %(collection)s
      AND (job.ended_at IS NULL OR job.ended_at > now() - make_interval(days => %(days)s))
    GROUP BY job.fingerprint, of.batch
)
SELECT fingerprint, batch, made_at FROM ended
WHERE NOT lives
  AND (answered > 0 OR ended_at < now() - least(%(longest)s::interval, %(first)s::interval * 2 ^ least(failures, 20)))
ORDER BY fingerprint, batch
