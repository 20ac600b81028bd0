-- No row is rewritten.

ALTER TABLE {target} ADD COLUMN IF NOT EXISTS {column} {type}
