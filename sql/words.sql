-- The words of a collection's texts in PostgreSQL: a table beside the texts, which triggers fill, and its GIN index.
-- {configuration}, {dictionary}: of text search; {language}, {described}: literals; {index}: its index.


-- name: configuration
-- Stems without stop words: those are taken out of queries, so that what consists of them alone is found as well.

CREATE TEXT SEARCH DICTIONARY {dictionary} (TEMPLATE = pg_catalog.snowball, LANGUAGE = {language});
CREATE TEXT SEARCH CONFIGURATION {configuration} (PARSER = pg_catalog."default");
ALTER TEXT SEARCH CONFIGURATION {configuration}
    ADD MAPPING FOR asciiword, word, numword, asciihword, hword, numhword, hword_asciipart, hword_part, hword_numpart
    WITH {dictionary};
ALTER TEXT SEARCH CONFIGURATION {configuration}
    ADD MAPPING FOR int, uint, float, sfloat, version, email, url, host, file, url_path WITH pg_catalog.simple


-- name: has_configuration
-- Whether there is a configuration of our own. Parameter: name.

SELECT EXISTS (
    SELECT FROM pg_ts_config WHERE cfgname = %(name)s AND cfgnamespace = to_regnamespace('embeddings'))


-- name: has_stemmer
-- Whether the server has a language's stemmer. Parameter: language.

SELECT EXISTS (SELECT FROM pg_ts_dict WHERE dictname = %(language)s || '_stem')


-- name: state
-- What the words in the table are: the comment that says so, and whether its index is there, which is made last. No row:
-- there is no table. Parameter: collection.

SELECT obj_description(class.oid, 'pg_class'), coalesce(index.indisvalid AND index.indisready, false)
FROM pg_class AS class
LEFT JOIN pg_class AS named
  ON named.relnamespace = class.relnamespace AND named.relname = class.relname || '_index' AND named.relkind = 'i'
LEFT JOIN pg_index AS index ON index.indexrelid = named.oid
WHERE class.oid = to_regclass(format('embeddings.%%I', %(collection)s::text || '_text_words'))


-- name: create
-- {described}: what `state` gives; {table}: the texts' table, as a literal. Who may read the texts may read their words.

CREATE TABLE {words} (
    text_id     bigint PRIMARY KEY,
    vector_name text COLLATE "C" NOT NULL,
    words       tsvector NOT NULL
);
COMMENT ON TABLE {words} IS {described};
CREATE TRIGGER words_of_new_texts AFTER INSERT ON {text}
    REFERENCING NEW TABLE AS new_texts FOR EACH STATEMENT EXECUTE FUNCTION embeddings.keep_words({described});
CREATE TRIGGER words_of_gone_texts AFTER DELETE ON {text}
    REFERENCING OLD TABLE AS gone_texts FOR EACH STATEMENT EXECUTE FUNCTION embeddings.keep_words();
DO $$
DECLARE
    reader text;
BEGIN
    FOR reader IN
        SELECT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END
        FROM pg_class CROSS JOIN LATERAL aclexplode(relacl)
        WHERE pg_class.oid = {table}::regclass AND privilege_type = 'SELECT' AND grantee <> relowner
    LOOP
        EXECUTE 'GRANT SELECT ON {words} TO ' || reader;
    END LOOP;
END $$


-- name: drop

DROP TRIGGER IF EXISTS words_of_new_texts ON {text};
DROP TRIGGER IF EXISTS words_of_gone_texts ON {text};
DROP TABLE IF EXISTS {words}


-- name: fill
-- The words of some texts that have none; how many those were, and the last one. What a commit is deleting now is left
-- out. Parameters: configuration, after, texts.

WITH lacking AS MATERIALIZED (
    SELECT text.id, text.vector_name, text.text
    FROM {text} AS text
    WHERE text.id > %(after)s AND NOT text.blank
      AND NOT EXISTS (SELECT FROM {words} AS words WHERE words.text_id = text.id)
    ORDER BY text.id
    LIMIT %(texts)s
    FOR KEY SHARE SKIP LOCKED
), filled AS (
    INSERT INTO {words} (text_id, vector_name, words)
    SELECT id, vector_name, embeddings.words(%(configuration)s::regconfig, text) FROM lacking
    ON CONFLICT (text_id) DO NOTHING
)
SELECT count(*), max(id) FROM lacking


-- name: lacks
-- Whether a text has no words yet.

SELECT EXISTS (
    SELECT FROM {text} AS text
    WHERE NOT text.blank AND NOT EXISTS (SELECT FROM {words} AS words WHERE words.text_id = text.id))


-- name: create_index
-- Without a list of what is yet to be sorted in: a search would read all of it.

CREATE INDEX CONCURRENTLY {index} ON {words} USING gin (words) WITH (fastupdate = off)
