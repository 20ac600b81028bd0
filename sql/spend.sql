-- What hosted models have cost, a row a day (UTC), collection, account and model.


-- name: record
-- An answer. Parameters: collection, account, model, fingerprint, texts, tokens, unpriced, usd, told, counted; moment: of
-- which day it is, NULL for now.

INSERT INTO embeddings.embedding_spend AS spend
    (day, collection, account, model, fingerprint, answers, texts, tokens, unpriced, usd, told, counted)
SELECT (coalesce(%(moment)s::timestamptz, now()) AT TIME ZONE 'UTC')::date, name, %(account)s, %(model)s,
       %(fingerprint)s, 1, %(texts)s, %(tokens)s, %(unpriced)s, %(usd)s, %(told)s, %(counted)s
FROM embeddings.collection WHERE name = %(collection)s
ON CONFLICT (day, collection, account, model, fingerprint) DO UPDATE
SET answers = spend.answers + 1, texts = spend.texts + excluded.texts, tokens = spend.tokens + excluded.tokens,
    unpriced = spend.unpriced + excluded.unpriced, usd = spend.usd + excluded.usd,
    told = spend.told + excluded.told, counted = spend.counted + excluded.counted


-- name: today
-- What a collection's answers of this day have cost, with what batch jobs that were made today are still expected to cost,
-- lost ones too, which the server may bill all the same;
-- and what those that are being asked for are expected to cost. Parameter: collection.

SELECT (SELECT coalesce(sum(usd), 0) FROM embeddings.embedding_spend
        WHERE collection = %(collection)s AND day = (now() AT TIME ZONE 'UTC')::date)
     + (SELECT coalesce(sum(usd * greatest(0, texts - answered - refused) / nullif(texts, 0)), 0)
        FROM embeddings.batch_job
        WHERE collection = %(collection)s AND (ended_at IS NULL OR state = 'lost')
          AND made_at >= date_trunc('day', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'),
       (SELECT coalesce(sum(usd), 0) FROM embeddings.embedding_claim
        WHERE collection = %(collection)s AND job IS NULL AND until >= now())


-- name: days
-- Of a collection, the last days with answers, the newest first. Parameters: collection, days.

SELECT day, sum(answers)::bigint, sum(texts)::bigint, sum(tokens)::bigint, sum(unpriced)::bigint, sum(usd),
       array_agg(DISTINCT model ORDER BY model)
FROM embeddings.embedding_spend
WHERE collection = %(collection)s
GROUP BY day ORDER BY day DESC LIMIT %(days)s


-- name: ratio
-- Tokens that a model's servers said, to those that were counted here for the same texts: of what was asked in the last
-- days. Parameters: fingerprint, days.

SELECT sum(told)::double precision / nullif(sum(counted), 0)
FROM embeddings.embedding_spend
WHERE fingerprint = %(fingerprint)s AND day > (now() AT TIME ZONE 'UTC')::date - %(days)s::integer
