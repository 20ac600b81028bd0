-- What one scan saw, for this session alone.

CREATE TEMPORARY TABLE scan_row (item_key text COLLATE "C" NOT NULL, row_hash bytea);
