-- Parameters: collection, watermark.

INSERT INTO embeddings.scan (collection, watermark, read_at)
VALUES (%(collection)s, %(watermark)s, now())
ON CONFLICT (collection) DO UPDATE SET watermark = excluded.watermark, read_at = excluded.read_at
