-- Where ledger, texts and model table disagree, whatever is dirty. Parameters: collection, fingerprint.

SELECT
    (SELECT count(*) FROM {item} AS item
     WHERE item.landed_hash IS NOT NULL
       AND NOT EXISTS (SELECT FROM {text} AS text WHERE text.item_key = item.item_key)) AS items_without_texts,
    (SELECT count(*) FROM {text} AS text
     WHERE NOT EXISTS (SELECT FROM {item} AS item WHERE item.item_key = text.item_key)) AS texts_without_item,
    (SELECT count(*)
     FROM {text} AS text
     JOIN {item} AS item ON item.item_key = text.item_key AND item.landed_hash IS NOT NULL
     WHERE NOT text.blank
       AND NOT EXISTS (SELECT FROM {written} AS vector WHERE vector.text_id = text.id)
       AND NOT EXISTS (
           SELECT FROM embeddings.quarantine
           WHERE quarantine.collection = %(collection)s AND quarantine.fingerprint = %(fingerprint)s
             AND quarantine.content_hash = text.content_hash)) AS texts_without_vector,
    (SELECT count(*) FROM {written} AS vector
     WHERE NOT EXISTS (SELECT FROM {text} AS text WHERE text.id = vector.text_id)) AS vectors_without_text,
    (SELECT count(*) FROM {written} AS vector
     JOIN {text} AS text ON text.id = vector.text_id
     WHERE vector.content_hash <> text.content_hash) AS vectors_of_another_text
