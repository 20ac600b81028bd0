-- Rule 3, an item at a time. Items that came into the batch since its keys were read are not looked at.
-- Parameters: batch, item_keys.
--   delete:   gone, and a scan said so (or nothing of it has landed)
--   vanished: gone, but no scan has said so yet: a scan decides, which refuses to wipe
--   leave:    not encoded by this run, or landed with the current hash while this run encoded another
--   land:     what this run encoded goes in

CREATE TEMPORARY TABLE landing_decision ON COMMIT DROP AS
SELECT
    item.item_key, item.landed_hash, encoded.encoded_hash, encoded.payload,
    item.payload AS old_payload, now.current_hash,
    CASE
        WHEN now.item_key IS NULL AND (item.seen_hash IS NULL OR item.landed_hash IS NULL) THEN 'delete'
        WHEN now.item_key IS NULL THEN 'vanished'
        WHEN encoded.item_key IS NULL THEN 'leave'
        WHEN encoded.encoded_hash <> now.current_hash AND item.landed_hash = now.current_hash THEN 'leave'
        ELSE 'land'
    END AS decision
FROM {item} AS item
LEFT JOIN landing_now AS now USING (item_key)
LEFT JOIN landing_item AS encoded USING (item_key)
WHERE item.batch = %(batch)s AND item.item_key = ANY (%(item_keys)s::text[])
