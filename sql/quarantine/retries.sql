-- The batches with a text whose time in quarantine is over, and how many such items. Parameters: collection, attempts.

SELECT item.batch, count(DISTINCT item.item_key)
FROM embeddings.quarantine
JOIN embeddings.collection ON collection.name = quarantine.collection
                          AND collection.fingerprint = quarantine.fingerprint
JOIN {text} AS text ON text.content_hash = quarantine.content_hash AND NOT text.blank
JOIN {item} AS item USING (item_key)
WHERE quarantine.collection = %(collection)s AND attempts < %(attempts)s AND next_try <= now()
GROUP BY item.batch
ORDER BY item.batch
