-- Each table has a primary key: in a publication FOR ALL TABLES, nothing can be updated or deleted in one without.

DO $$
DECLARE
    made record;
BEGIN
    FOR made IN
        SELECT class.oid::regclass AS name, class.relname, (
                SELECT named.relname FROM pg_index AS unique_index JOIN pg_class AS named ON named.oid = indexrelid
                WHERE indrelid = class.oid AND named.relname = class.relname || '_text' AND indisunique AND indisvalid
            ) AS text_index
        FROM pg_class AS class
        WHERE class.relnamespace = 'embeddings'::regnamespace AND class.relkind = 'r'
          AND class.relname ~ '_(current|hash)_[0-9a-f]+$'
          AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = class.oid AND indisprimary)
    LOOP
        IF made.text_index IS NOT NULL THEN
            EXECUTE format('ALTER TABLE %s ADD CONSTRAINT %I PRIMARY KEY USING INDEX %I',
                           made.name, made.text_index, made.text_index);
        ELSIF made.relname ~ '_current_[0-9a-f]+$' THEN
            EXECUTE format('ALTER TABLE %s ADD COLUMN IF NOT EXISTS fingerprint text PRIMARY KEY', made.name);
        END IF;
    END LOOP;
END $$;
