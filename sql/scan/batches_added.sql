-- Parameters: collection, first and last batch that got new items, size of the last one.

WITH added AS (
    INSERT INTO embeddings.batch (collection, batch)
    SELECT %(collection)s, batch FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS batch
    ON CONFLICT DO NOTHING
)
UPDATE embeddings.collection SET last_batch = %(last)s, last_batch_size = %(size)s WHERE name = %(collection)s
