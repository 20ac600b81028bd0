-- Queries: nearest neighbours, exact or by an index. {vector_name}: a literal; {type}: halfvec(n) or vector(n).
-- {joined}, {matching}: what a filter adds to the tables and to the condition, empty without one; {condition}: the filter
-- itself; {compare_all}: empty, or what no ANN index knows; {names}: vector names; {nearest}, {ranked}: one of the
-- statements that give texts and their distance, or their score.


-- name: hits
-- Items of the texts that another statement gives (text_id, distance): each once, with its nearest text; and how many
-- texts those were. Parameters: k, and that statement's. A vector of zeros, as somebody else may write it, is at no
-- distance: NaN, which is ordered last.

WITH nearest AS MATERIALIZED (
    {nearest}
), best AS (
    SELECT DISTINCT ON (text.item_key)
        text.item_key, nearest.distance, text.text, text.vector_name, text.chunk
    FROM nearest
    JOIN {text} AS text ON text.id = nearest.text_id
    WHERE nearest.distance <> 'NaN'
    ORDER BY text.item_key, nearest.distance, text.chunk
)
SELECT item.item_key, 1 - best.distance AS score, item.payload, best.text, best.vector_name, best.chunk,
       (SELECT count(*) FROM nearest) AS texts
FROM best
JOIN {item} AS item ON item.item_key = best.item_key
ORDER BY score DESC, item.item_key COLLATE "C"
LIMIT %(k)s


-- name: nearest
-- The texts nearest to a vector. Parameters: query, texts. Texts as near as the last one are taken too, so that equal ones
-- come in the order of their items' keys.

SELECT vector.text_id, (vector.embedding <=> %(query)s::{type}){compare_all} AS distance
FROM {vector} AS vector {joined}
WHERE vector.vector_name = {vector_name} {matching}
ORDER BY distance
FETCH FIRST %(texts)s ROWS WITH TIES


-- name: nearest_asked
-- The texts nearest to a vector whose items match: an ANN index gives one text after another, in order, and each is asked
-- whether its item does. With OFFSET the planner makes no join of that. Parameters: query, texts; most (to be asked).

SELECT candidate.text_id, candidate.distance
FROM (
    SELECT text_id, embedding <=> %(query)s::{type} AS distance
    FROM {vector}
    WHERE vector_name = {vector_name}
    ORDER BY distance
    LIMIT %(most)s
) AS candidate
WHERE EXISTS (
    SELECT
    FROM {text} AS text
    JOIN {item} AS item ON item.item_key = text.item_key
    WHERE text.id = candidate.text_id AND ({condition})
    OFFSET 0
)
ORDER BY candidate.distance
FETCH FIRST %(texts)s ROWS WITH TIES


-- name: of_ids
-- Those of the texts with these ids that are there, and whose items match: that is asked first, since a vector takes longer
-- to fetch. Parameters: query, ids.

WITH matching AS MATERIALIZED (
    SELECT text.id
    FROM {text} AS text
    JOIN {item} AS item ON item.item_key = text.item_key
    WHERE text.id = ANY (%(ids)s) AND text.vector_name = {vector_name} AND ({condition})
)
SELECT vector.text_id, vector.embedding <=> %(query)s::{type} AS distance
FROM matching
JOIN {vector} AS vector ON vector.text_id = matching.id


-- name: matching
-- The items that meet a condition: asked for how many rows are expected of it.

SELECT FROM {item} AS item WHERE {condition}


-- name: matching_texts
-- The texts of those items, and in which batches these are. {of_batches}: empty, or in which of them (parameter: batches).

SELECT text.id, item.batch
FROM {item} AS item
JOIN {text} AS text ON text.item_key = item.item_key AND text.vector_name = {vector_name}
WHERE ({condition}) {of_batches}


-- name: commits
-- Which database and which life of a collection's tables this is, and what differs once a batch was committed. Parameter:
-- collection.

SELECT identity.id::text, collection.epoch::text, (
    SELECT coalesce(sum(hash_record_extended(ROW (batch.batch, batch.committed_at, batch.xmin), 0)), 0)
    FROM embeddings.batch
    WHERE batch.collection = collection.name AND batch.committed_at IS NOT NULL)
FROM embeddings.collection, embeddings.database_identity AS identity
WHERE collection.name = %(collection)s


-- name: batch_commits
-- The last commit of each batch. Parameter: collection.

SELECT batch, committed_at::text, xmin::text
FROM embeddings.batch
WHERE collection = %(collection)s AND committed_at IS NOT NULL


-- name: nearest_among
-- Those of these texts that are nearest to a vector. Parameters: query, ids, texts.

SELECT vector.text_id, (vector.embedding <=> %(query)s::{type}){compare_all} AS distance
FROM {vector} AS vector
WHERE vector.text_id = ANY (%(ids)s::bigint[]) AND vector.vector_name = {vector_name}
ORDER BY distance
FETCH FIRST %(texts)s ROWS WITH TIES


-- name: texts
-- The texts nearest to a vector. Parameters: query, n.

SELECT text_id, 1 - distance
FROM (
    SELECT text_id, embedding <=> %(query)s::{type} AS distance
    FROM {vector}
    WHERE vector_name = {vector_name}
    ORDER BY distance
    LIMIT %(n)s
) AS nearest
WHERE distance <> 'NaN'


-- name: size
-- What a table takes, in bytes. Parameter: table.

SELECT pg_table_size(%(table)s::regclass)


-- name: settings
-- For this transaction, those of the settings (name → value, both texts) that the server has: an older pgvector scans an
-- index once. The comparison has pgvector loaded, which brings its settings. Parameter: settings.

SELECT set_config(key, value, true)
FROM jsonb_each_text(%(settings)s)
WHERE current_setting(key, true) IS NOT NULL AND '[1]'::vector IS NOT NULL


-- name: vectors_of
-- The direction of each of an item's vectors, by name: the mean of its chunks'. Parameter: item_key.

SELECT text.vector_name, avg(l2_normalize(vector.embedding)::vector)::real[]
FROM {text} AS text
JOIN {vector} AS vector ON vector.text_id = text.id
WHERE text.item_key = %(item_key)s AND text.vector_name = ANY ({names}::text[])
GROUP BY text.vector_name
ORDER BY array_position({names}::text[], text.vector_name)


-- name: is_item
-- Whether there is an item. Parameter: item_key.

SELECT FROM {item} WHERE item_key = %(item_key)s AND committed_hash IS NOT NULL


-- name: known
-- How many of these keys are items', and the key of any item. Parameter: keys.

SELECT (SELECT count(*) FROM {item} WHERE item_key = ANY (%(keys)s) AND committed_hash IS NOT NULL),
       (SELECT item_key FROM {item} WHERE committed_hash IS NOT NULL LIMIT 1)


-- name: titles
-- Some of the texts that a column of the payload has, always the same, each with the items that have it. Parameters:
-- column, number.

SELECT payload ->> %(column)s AS title, array_agg(item_key ORDER BY item_key)
FROM {item}
WHERE committed_hash IS NOT NULL AND btrim(payload ->> %(column)s) <> ''
GROUP BY title
ORDER BY md5(payload ->> %(column)s)
LIMIT %(number)s


-- name: payload_is_behind
-- Whether the payload of a batch lacks one of these columns, since it was committed for another definition: seen from one
-- item of each such batch, for its items are committed together. Parameters: collection, definition_hash, columns.

SELECT EXISTS (
    SELECT FROM embeddings.batch
    CROSS JOIN LATERAL (
        SELECT payload FROM {item} AS item
        WHERE item.batch = batch.batch AND item.committed_hash IS NOT NULL AND item.payload IS NOT NULL
        LIMIT 1
    ) AS item
    WHERE batch.collection = %(collection)s AND batch.definition_hash IS DISTINCT FROM %(definition_hash)s
      AND NOT item.payload ?& %(columns)s::text[]
)


-- name: lexemes
-- What PostgreSQL's text search makes of words. Parameters: configuration, words.

SELECT lexeme FROM unnest(to_tsvector(%(configuration)s::regconfig, %(words)s))


-- name: by_words
-- The texts that have any of these words, best first; those that score the same in the order of their ids. The table is
-- called as a filter's tables are joined to it. Parameters: words (a tsquery), names, texts.

SELECT vector.text_id, ts_rank(vector.words, %(words)s::tsquery, 1)::double precision AS score
FROM {words} AS vector {joined}
WHERE vector.words @@ %(words)s::tsquery AND vector.vector_name = ANY (%(names)s::text[]) {matching}
ORDER BY score DESC, text_id
LIMIT %(texts)s


-- name: changed_by_words
-- The texts that came after a generation and have any of these words. Parameters: newest, lacking, words, name, texts.

SELECT text.id, text.text
FROM {words} AS words
JOIN {text} AS text ON text.id = words.text_id
JOIN {item} AS item ON item.item_key = text.item_key
WHERE words.words @@ %(words)s::tsquery AND words.vector_name = %(name)s
  AND (words.text_id > %(newest)s OR words.text_id = ANY (%(lacking)s::bigint[])) AND ({condition})
ORDER BY ts_rank(words.words, %(words)s::tsquery, 1) DESC, text.id
LIMIT %(texts)s


-- name: given
-- Texts whose scores are known. Parameters: ids, scores.

SELECT text_id, score
FROM unnest(%(ids)s::bigint[], %(scores)s::double precision[]) AS given (text_id, score)


-- name: ranked_hits
-- Items of the texts that another statement gives (text_id, score): each once, with its best text, if that is there and
-- has a vector; and how many texts were given. Parameters: k, and that statement's.

WITH ranked AS MATERIALIZED (
    {ranked}
), best AS (
    SELECT DISTINCT ON (text.item_key)
        text.item_key, ranked.score, item.payload, text.text, text.vector_name, text.chunk, text.id
    FROM ranked
    JOIN {text} AS text ON text.id = ranked.text_id
    JOIN {vector} AS vector ON vector.text_id = ranked.text_id
    JOIN {item} AS item ON item.item_key = text.item_key
    WHERE {condition}
    ORDER BY text.item_key, ranked.score DESC, text.id
)
SELECT counted.texts, hit.item_key, hit.score, hit.payload, hit.text, hit.vector_name, hit.chunk
FROM (SELECT count(*) AS texts FROM ranked) AS counted
LEFT JOIN (SELECT * FROM best ORDER BY score DESC, id LIMIT %(k)s) AS hit ON true
ORDER BY hit.score DESC, hit.id
