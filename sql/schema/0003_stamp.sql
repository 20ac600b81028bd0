-- What names a content must never come twice. A count does, once a database has gone back: restored from a backup, or
-- failed over to a server that lacked the last commits. So each change of a collection's version gives it a random stamp,
-- and files outside the database say of which one they are.

CREATE TABLE embeddings.database_identity (
    id     uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    single boolean NOT NULL DEFAULT true UNIQUE CHECK (single)
);
INSERT INTO embeddings.database_identity DEFAULT VALUES;

ALTER TABLE embeddings.collection ADD COLUMN stamp uuid NOT NULL DEFAULT gen_random_uuid();

-- The stamps that a collection had before. Files of one of these are behind; of any other they are foreign.
CREATE TABLE embeddings.collection_stamp (
    collection text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    version    bigint NOT NULL,
    stamp      uuid NOT NULL,
    PRIMARY KEY (collection, version)
);

-- A trigger, so that whoever raises the version stamps, programs of an earlier release included.
CREATE FUNCTION embeddings.stamp_collection() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO embeddings.collection_stamp (collection, version, stamp) VALUES (OLD.name, OLD.version, OLD.stamp)
    ON CONFLICT (collection, version) DO UPDATE SET stamp = excluded.stamp;
    DELETE FROM embeddings.collection_stamp
    WHERE collection_stamp.collection = OLD.name AND collection_stamp.version = OLD.version - 10000;
    NEW.stamp := gen_random_uuid();
    RETURN NEW;
END $$;
CREATE TRIGGER stamp_collection BEFORE UPDATE OF version ON embeddings.collection
    FOR EACH ROW WHEN (NEW.version IS DISTINCT FROM OLD.version) EXECUTE FUNCTION embeddings.stamp_collection();

-- Whoever may read or write `embeddings.collection` may do so here.
DO $$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT acl.privilege_type, coalesce(role.rolname, 'public') AS grantee, role.oid IS NULL AS is_public
        FROM pg_class AS class
        CROSS JOIN LATERAL aclexplode(class.relacl) AS acl
        LEFT JOIN pg_roles AS role ON role.oid = acl.grantee
        WHERE class.oid = 'embeddings.collection'::regclass AND acl.grantee <> class.relowner
          AND acl.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    LOOP
        EXECUTE format(
            'GRANT %s ON embeddings.database_identity, embeddings.collection_stamp TO %s', granted.privilege_type,
            CASE WHEN granted.is_public THEN 'PUBLIC' ELSE quote_ident(granted.grantee) END);
    END LOOP;
END $$;
