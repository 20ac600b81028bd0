-- Parameter: collection.

SELECT collection.fingerprint, collection.version, collection.epoch::text, scan.whole_scan_at
FROM embeddings.collection
LEFT JOIN embeddings.scan ON scan.collection = collection.name
WHERE collection.name = %(collection)s
