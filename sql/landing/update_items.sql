-- What was seen is what the second look saw, so a change since the run's first read is dirty at once.

UPDATE {item} AS item
SET seen_hash = decided.current_hash,
    seen_at = CASE WHEN item.seen_hash IS DISTINCT FROM decided.current_hash THEN now() ELSE item.seen_at END,
    landed_hash = CASE WHEN decided.decision = 'land' THEN decided.encoded_hash ELSE item.landed_hash END,
    payload = CASE WHEN decided.decision = 'land' THEN decided.payload ELSE item.payload END
FROM landing_decision AS decided
WHERE item.item_key = decided.item_key AND decided.decision IN ('land', 'leave')
  AND (item.seen_hash IS DISTINCT FROM decided.current_hash
       OR decided.decision = 'land' AND (item.landed_hash IS DISTINCT FROM decided.encoded_hash
                                         OR item.payload IS DISTINCT FROM decided.payload))
