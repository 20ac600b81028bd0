-- A row with a key that no item can have (too long, bytes that are no text) is told in quarantine: of each full scan, and
-- of no item.

ALTER TABLE embeddings.quarantined_item
    DROP CONSTRAINT quarantined_item_step_check,
    ADD CONSTRAINT quarantined_item_step_check CHECK (step IN ('read', 'render', 'store', 'key'));
