-- Parameters: collection, scanned.

INSERT INTO embeddings.scan (collection, whole_scan_at, scanned)
VALUES (%(collection)s, now(), %(scanned)s)
ON CONFLICT (collection) DO UPDATE SET whole_scan_at = excluded.whole_scan_at, scanned = excluded.scanned
