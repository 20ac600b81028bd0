-- Items first seen lately of which nothing has landed, the oldest first. Parameters: days, limit.

SELECT batch, item_key
FROM {item}
WHERE landed_hash IS NULL AND seen_hash IS NOT NULL AND first_seen_at >= now() - interval '1 day' * %(days)s
ORDER BY first_seen_at, item_key
LIMIT %(limit)s
