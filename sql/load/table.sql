-- A source table with a key and an `updated_at` that tells the truth: a stand-in for the user's own. A table that is
-- there already is the user's, and gets neither.

CREATE TABLE {table} ({columns}, updated_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY ({key}));

CREATE OR REPLACE FUNCTION embeddings.touch_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := clock_timestamp();
    RETURN NEW;
END $$;

CREATE TRIGGER touch_updated_at BEFORE UPDATE ON {table}
FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION embeddings.touch_updated_at();
