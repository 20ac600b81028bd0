-- Since when the longest-waiting change has waited, and when the source was last read. Parameter: collection.

SELECT
    (SELECT min(coalesce(seen_at, first_seen_at)) FROM {item} WHERE seen_hash IS DISTINCT FROM landed_hash),
    scan.whole_scan_at,
    scan.read_at
FROM embeddings.collection
LEFT JOIN embeddings.scan ON scan.collection = collection.name
WHERE collection.name = %(collection)s
