-- What checks found, what failed, and who is at work: written as it happens, read by `status`.


-- name: note_check
-- Parameters: collection, check, passed, severity, description.

INSERT INTO embeddings.check_result (collection, name, passed, severity, description)
SELECT name, %(check)s, %(passed)s, %(severity)s, %(description)s
FROM embeddings.collection WHERE name = %(collection)s
ON CONFLICT (collection, name) DO UPDATE
SET passed = excluded.passed, severity = excluded.severity, description = excluded.description, checked_at = now()


-- name: checks
-- Parameter: collection.

SELECT name, passed, severity, description, checked_at, extract(epoch FROM now() - checked_at)::double precision
FROM embeddings.check_result WHERE collection = %(collection)s


-- name: note_failure
-- Nothing is noted of a collection that the database does not know. Parameters: collection, step, reason.

INSERT INTO embeddings.failure (collection, step, reason)
SELECT name, %(step)s, %(reason)s FROM embeddings.collection WHERE name = %(collection)s
ON CONFLICT (collection, step) DO UPDATE SET reason = excluded.reason, failed_at = now()


-- name: mended
-- Parameters: collection, step.

DELETE FROM embeddings.failure WHERE collection = %(collection)s AND step = %(step)s


-- name: failures
-- Parameter: collection.

SELECT step, reason, failed_at, extract(epoch FROM now() - failed_at)::double precision
FROM embeddings.failure WHERE collection = %(collection)s
ORDER BY failed_at


-- name: waiting
-- Batches that were tried and are not committed: how many, the most attempts, the first next try, and why the one that
-- was tried last failed. A first try that goes on is none of them. Parameters: collection, and working: somebody is at
-- work.

SELECT count(*), max(attempts), min(next_try),
       (array_agg(failure ORDER BY next_try DESC) FILTER (WHERE failure IS NOT NULL))[1]
FROM embeddings.batch
WHERE collection = %(collection)s AND attempts > 0
  AND NOT (attempts = 1 AND failure IS NULL AND (%(working)s OR next_try > now()))


-- name: quarantine
-- Of the texts in quarantine under a model and the whole items in it: how many are given up, and when the first of the
-- others is tried again. Parameters: collection, fingerprint, attempts.

SELECT count(*) FILTER (WHERE attempts >= %(attempts)s), min(next_try) FILTER (WHERE attempts < %(attempts)s)
FROM (
    SELECT attempts, next_try FROM embeddings.quarantine
    WHERE collection = %(collection)s AND fingerprint = %(fingerprint)s
    UNION ALL
    SELECT attempts, next_try FROM embeddings.quarantined_item WHERE collection = %(collection)s AND step <> 'key'
) AS kept


-- name: activities
-- Parameter: collection (NULL: all).

SELECT id, collection, what, who, started_at, phase, done, total
FROM embeddings.activity
WHERE %(collection)s::text IS NULL OR collection = %(collection)s::text
ORDER BY started_at


-- name: begin_activity
-- Parameters: id, collection, what, who.

INSERT INTO embeddings.activity (id, collection, what, who)
SELECT %(id)s, name, %(what)s, %(who)s FROM embeddings.collection WHERE name = %(collection)s
ON CONFLICT DO NOTHING


-- name: tell_activity
-- Parameters: id, phase, done, total.

UPDATE embeddings.activity SET phase = %(phase)s, done = %(done)s, total = %(total)s WHERE id = %(id)s


-- name: end_activities
-- Parameter: ids.

DELETE FROM embeddings.activity WHERE id = ANY (%(ids)s::text[])


-- name: undefined
-- What the database keeps of collections that are not defined. Parameter: defined.

SELECT name FROM embeddings.collection WHERE name <> ALL (%(defined)s::text[]) ORDER BY name
