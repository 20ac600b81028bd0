DELETE FROM {item} AS item
USING landing_decision AS decided
WHERE decided.decision = 'delete' AND item.item_key = decided.item_key
