-- Vectors that cannot be right. Parameters: dimension, normalized, tolerance.
-- Stored values are always finite (pgvector refuses others on the way in); a length that is not says otherwise.

WITH measured AS (
    SELECT vector_dims(embedding) AS dimension, {norm}(embedding) AS length, content_hash, embedding FROM {vector}
), first AS (
    SELECT content_hash, embedding FROM {vector} ORDER BY text_id LIMIT 1
)
SELECT
    count(*),
    count(*) FILTER (WHERE dimension <> %(dimension)s),
    count(*) FILTER (WHERE length IS NULL OR length = 'NaN' OR length = 'Infinity'),
    count(*) FILTER (WHERE %(normalized)s AND abs(length - 1) > %(tolerance)s),
    count(DISTINCT measured.content_hash) > 1 AND bool_and(measured.embedding = (SELECT embedding FROM first))
FROM measured
