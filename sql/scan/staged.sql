-- The unique index finds a key that came twice, and serves the comparison of single batches.

CREATE UNIQUE INDEX scan_row_key ON scan_row (item_key);
ANALYZE scan_row;
