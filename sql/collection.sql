-- What there is of a collection, its removal and its renaming.


-- name: listed
-- Every collection that the database knows, with its current model's profile.

SELECT collection.name, collection.renamed_from, collection.fingerprint, model.profile ->> 'name'
FROM embeddings.collection
LEFT JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = collection.fingerprint
ORDER BY collection.name


-- name: relations
-- A collection's tables and views with their sizes, indexes included. Parameter: collection.

SELECT class.relname, class.relkind::text, pg_total_relation_size(class.oid)
FROM pg_class AS class
WHERE class.relnamespace = to_regnamespace('embeddings') AND class.relkind IN ('r', 'v')
  AND (class.relname IN (%(collection)s::text, %(collection)s::text || '_item', %(collection)s::text || '_text',
                         %(collection)s::text || '_text_words')
       OR class.relname ~ ('^' || %(collection)s::text || '_(vector|current|written|hash|lacking)_[0-9a-f]+$'))
ORDER BY class.relkind = 'r', class.relname


-- name: user_columns
-- The columns of the user's own tables that hold a collection's vectors: its views show them. Parameter: views.

SELECT DISTINCT depends.refobjid::regclass::text || '.' || quote_ident(attribute.attname)
FROM pg_rewrite AS rule
JOIN pg_depend AS depends ON depends.classid = 'pg_rewrite'::regclass AND depends.objid = rule.oid
JOIN pg_attribute AS attribute
  ON attribute.attrelid = depends.refobjid AND attribute.attnum = depends.refobjsubid
JOIN pg_type AS type ON type.oid = attribute.atttypid
JOIN pg_class AS class ON class.oid = depends.refobjid AND class.relnamespace <> 'embeddings'::regnamespace
WHERE rule.ev_class::regclass::text = ANY (%(views)s) AND depends.refclassid = 'pg_class'::regclass
  AND type.typname IN ('vector', 'halfvec')
ORDER BY 1


-- name: count
-- {table}: a table or view of the collection.

SELECT count(*) FROM {table}


-- name: open_change
-- The phase of the model change that is under way. Parameter: collection.

SELECT phase FROM embeddings.model_change WHERE collection = %(collection)s::text AND phase IN ('expanded', 'swapped')


-- name: batch_jobs
-- How many batch jobs are at work. Parameter: collection.

SELECT count(*) FROM embeddings.batch_job WHERE collection = %(collection)s::text AND ended_at IS NULL


-- name: models
-- Parameter: collection.

SELECT fingerprint, dimension, storage FROM embeddings.model WHERE collection = %(collection)s::text


-- name: forget
-- All that the shared tables say of a collection. {collection}: its name.

DELETE FROM embeddings.collection WHERE name = {collection}


-- name: parts
-- Indexes and sequences of tables: their names are the schema's, too. Parameter: tables.

SELECT named.relname, named.relkind::text
FROM pg_class AS owner
JOIN pg_class AS named
  ON named.oid IN (
      SELECT indexrelid FROM pg_index WHERE indrelid = owner.oid
      UNION ALL
      SELECT objid FROM pg_depend
      WHERE refclassid = 'pg_class'::regclass AND refobjid = owner.oid AND classid = 'pg_class'::regclass
        AND deptype IN ('a', 'i'))
WHERE owner.relnamespace = 'embeddings'::regnamespace AND owner.relname = ANY (%(tables)s)
  AND named.relkind IN ('i', 'S')
ORDER BY named.relname


-- name: rename
-- Every shared table follows (ON UPDATE CASCADE). {old} {new}: names. Until the renaming has ended, `renamed_from` keeps
-- runs from both names.

UPDATE embeddings.collection SET name = {new}, renamed_from = {old} WHERE name = {old}


-- name: renamed
-- The renaming has ended. Parameter: collection.

UPDATE embeddings.collection SET renamed_from = NULL WHERE name = %(collection)s::text


-- name: being_renamed
-- The renaming that a collection is in, as the old or the new name. Parameter: collection.

SELECT renamed_from, name
FROM embeddings.collection
WHERE renamed_from IS NOT NULL AND %(collection)s::text IN (name, renamed_from)
