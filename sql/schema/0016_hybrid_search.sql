-- Searches in SQL, for other programs: `embeddings.hybrid_search`, which finds what a hybrid search of the library finds
-- whose words PostgreSQL looks up. Whoever calls it needs the rights to read what it reads. No byte of what is asked
-- becomes a part of a statement: names are made of what the table below says, and all values are parameters.

-- How a collection is searched, as the definition in force says.
CREATE TABLE embeddings.search_definition (
    collection     text PRIMARY KEY REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    digest         text NOT NULL,                        -- of what the others were made from
    vectors        text[] NOT NULL,                      -- vector names, the one that is asked for if none is named first
    filters        jsonb NOT NULL,                       -- column → {"type": …, "separator": …}
    words          jsonb,                                -- configuration, stop_words, k, dense, text; NULL without `words:`
    texts_per_item bigint NOT NULL                       -- that are expected among the nearest
);

CREATE TYPE embeddings.hybrid_search_hit AS (
    item_key text, score double precision, payload jsonb, text text, vector_name text, chunk bigint
);

-- Needs no right on a table, as current_model. No row: there is no such model, or the definition is not known yet.
CREATE FUNCTION embeddings.searched_by(collection_name text, model_fingerprint text)
RETURNS TABLE (vectors text[], filters jsonb, words jsonb, texts_per_item bigint, dimension bigint, storage text)
LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT definition.vectors, definition.filters, definition.words, definition.texts_per_item, model.dimension, model.storage
    FROM embeddings.search_definition AS definition
    JOIN embeddings.model ON model.collection = definition.collection AND model.fingerprint = model_fingerprint
    WHERE definition.collection = collection_name
$$;


-- The words of a query that are looked for, as `index/terms.py` has them: each once, joined ones as a whole, too; without
-- stop words, unless there are no others; 500 at most.
CREATE FUNCTION embeddings.query_words(query text, stop_words text[])
RETURNS text[] LANGUAGE sql STABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
    WITH word AS (
        SELECT place, regexp_split_to_array(
            normalize(typed[1], NFKC),
            '[\s!-/:-@\[-`{-~\u00a0-\u00bf\u060c\u061b\u061f\u0964\u2000-\u200b\u200e-\u206f\u3000-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20]+'
        ) AS parts
        FROM regexp_matches(
            lower(query),
            '([^\s!-/:-@\[-`{-~\u00a0-\u00bf\u060c\u061b\u061f\u0964\u2000-\u200b\u200e-\u206f\u3000-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20]+(?:[''./_@&\u2010\u2011\u2019\u02bc-][^\s!-/:-@\[-`{-~\u00a0-\u00bf\u060c\u061b\u061f\u0964\u2000-\u200b\u200e-\u206f\u3000-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20]+)*)',
            'g') WITH ORDINALITY AS found (typed, place)
    ), term AS (
        SELECT place, number, part AS term FROM word, unnest(parts) WITH ORDINALITY AS unnested (part, number)
        UNION ALL
        SELECT place, cardinality(parts) + 1, array_to_string(parts, '') FROM word WHERE cardinality(parts) > 1
    ), every AS (
        SELECT term, row_number() OVER (ORDER BY min(ARRAY[place, number])) AS place,
               term = ANY (stop_words) AS stops
        FROM term
        WHERE length(term) BETWEEN 1 AND 500
        GROUP BY term
        ORDER BY 2
        LIMIT 1000
    )
    SELECT coalesce((array_agg(term ORDER BY place) FILTER (WHERE NOT stops))[:500],
                    (array_agg(term ORDER BY place))[:500], '{}')
    FROM every
$$;


-- What the operand of a filter says, as values of its type: one, or for a list any number. Raises what is none.
CREATE FUNCTION embeddings.filter_operands(collection text, named text, type text, given jsonb)
RETURNS jsonb LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wrong jsonb;
    why text := 'none';
    moment CONSTANT text := '^(\d{4})-?(\d{2})-?(\d{2})(?:[Tt ]([01]\d|2[0-3])(?::?([0-5]\d)(?::?([0-5]\d)(?:[.,](\d{1,6})\d*)?)?)?\s*([Zz]|[+-]\d{2}(?::?\d{2}){0,2})?)?$';
    values jsonb := given;
BEGIN
    SELECT element INTO wrong FROM jsonb_array_elements(given) AS element
    WHERE jsonb_typeof(element) <> CASE type WHEN 'number' THEN 'number' WHEN 'boolean' THEN 'boolean' ELSE 'string' END
    LIMIT 1;
    IF wrong IS NULL AND type = 'number' THEN
        why := 'longer than any that is filtered by';
        SELECT element INTO wrong FROM jsonb_array_elements(given) AS element
        WHERE element::numeric <> 0 AND (abs(element::numeric) >= 1e401 OR abs(element::numeric) < 1e-400)
        LIMIT 1;
    ELSIF wrong IS NULL AND type = 'texts' THEN
        why := 'longer than 500 characters';
        SELECT coalesce(jsonb_agg(btrim(element, E' \t\n\r\f\x0B') ORDER BY place), '[]') INTO values
        FROM jsonb_array_elements_text(given) WITH ORDINALITY AS given_part (element, place);
        SELECT to_jsonb(element) INTO wrong FROM jsonb_array_elements_text(values) AS element WHERE length(element) > 500 LIMIT 1;
    ELSIF wrong IS NULL AND type = 'timestamp' THEN
        SELECT coalesce(jsonb_agg(embeddings.filter_timestamp(to_jsonb(
                   format('%s-%s-%s %s:%s:%s.%s%s', part[1], part[2], part[3], coalesce(part[4], '00'), coalesce(part[5], '00'),
                          coalesce(part[6], '00'), coalesce(part[7], '0'), coalesce(part[8], 'Z')))) ORDER BY place), '[]')
        INTO values
        FROM jsonb_array_elements_text(given) WITH ORDINALITY AS given_time (element, place)
        LEFT JOIN LATERAL regexp_match(btrim(element), moment) AS part ON true;
        SELECT given -> (place::integer - 1) INTO wrong
        FROM jsonb_array_elements(values) WITH ORDINALITY AS made (element, place)
        WHERE element = 'null' LIMIT 1;
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('collection %s: where: %s is a %s, and %s is %s', collection, to_json(named),
                             CASE type WHEN 'texts' THEN 'list of texts' ELSE type END, left(wrong::text, 60), why),
            HINT = format('Write {%s: %s}.', to_json(named), CASE type
                WHEN 'number' THEN '{"gte": 2000}' WHEN 'timestamp' THEN '{"gte": "2026-01-31"}' WHEN 'boolean' THEN 'true'
                WHEN 'text' THEN '"a text"' ELSE '{"any": ["one", "another"]}' END);
    END IF;
    RETURN values;
END $$;


-- What one operator of a condition asks of the table of items, called `item`; its values are added to the parameters $1 to
-- $4: the columns, and the values of each type.
CREATE FUNCTION embeddings.where_comparison(
    collection text, named text, kind jsonb, operator text, operand jsonb, INOUT columns text[], INOUT numbers numeric[],
    INOUT texts text[], INOUT times timestamptz[], OUT statement text
) LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    type CONSTANT text := kind ->> 'type';
    allowed CONSTANT text[] := CASE type
        WHEN 'boolean' THEN ARRAY['eq', 'ne'] WHEN 'text' THEN ARRAY['eq', 'ne', 'any']
        WHEN 'texts' THEN ARRAY['eq', 'ne', 'any', 'all'] ELSE ARRAY['eq', 'ne', 'gt', 'gte', 'lt', 'lte', 'any'] END;
    takes_list CONSTANT boolean := operator IN ('any', 'all');
    expression text;
    operands jsonb;
    first integer;
    several text;
BEGIN
    IF operator <> ALL (allowed) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('collection %s: where: %s is a %s, which has no operator %s', collection, to_json(named),
                             CASE type WHEN 'texts' THEN 'list of texts' ELSE type END, to_json(left(operator, 60))),
            HINT = format('It has %s.', array_to_string(allowed, ', '));
    END IF;
    IF operator = 'ne' THEN
        SELECT made.columns, made.numbers, made.texts, made.times, format('((%s) IS NOT TRUE)', made.statement)
        INTO columns, numbers, texts, times, statement
        FROM embeddings.where_comparison(collection, named, kind, 'eq', operand, columns, numbers, texts, times) AS made;
        RETURN;
    END IF;
    columns := columns || ARRAY[named, coalesce(kind ->> 'separator', '')];
    expression := format(
        CASE type WHEN 'texts' THEN 'embeddings.filter_texts(item.payload -> ($1)[%s], ($1)[%s])'
                  WHEN 'number' THEN 'embeddings.filter_number(item.payload -> ($1)[%s])'
                  WHEN 'timestamp' THEN 'embeddings.filter_timestamp(item.payload -> ($1)[%s])'
                  WHEN 'boolean' THEN 'embeddings.filter_boolean(item.payload -> ($1)[%s])'
                  ELSE 'embeddings.filter_text(item.payload -> ($1)[%s])' END,
        cardinality(columns) - 1, cardinality(columns));
    IF operator = 'eq' AND operand = 'null' THEN
        statement := format('(%s IS NULL)', expression);
        RETURN;
    END IF;
    IF takes_list AND jsonb_typeof(operand) <> 'array' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('collection %s: where: `%s` of %s takes a list, and not %s', collection, operator,
                             to_json(named), left(operand::text, 60)),
            HINT = format('Write {%s: {"%s": […]}}.', to_json(named), operator);
    END IF;
    operands := embeddings.filter_operands(collection, named, type, CASE WHEN takes_list THEN operand ELSE jsonb_build_array(operand) END);
    IF cardinality(numbers) + cardinality(texts) + cardinality(times) + jsonb_array_length(operands) > 100000 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('collection %s: where: it has more than 100,000 values', collection),
            HINT = 'Ask in several searches.';
    END IF;
    IF type = 'boolean' THEN
        statement := format('(%s = %s)', expression, CASE operands -> 0 WHEN 'true' THEN 'true' ELSE 'false' END);
        RETURN;
    ELSIF type = 'number' THEN
        first := cardinality(numbers) + 1;
        numbers := numbers || ARRAY(SELECT element::numeric FROM jsonb_array_elements(operands) WITH ORDINALITY AS one (element, place) ORDER BY place);
        several := format('($2)[%s:%s]', first, cardinality(numbers));
    ELSIF type = 'timestamp' THEN
        first := cardinality(times) + 1;
        times := times || ARRAY(SELECT element::timestamptz FROM jsonb_array_elements_text(operands) WITH ORDINALITY AS one (element, place) ORDER BY place);
        several := format('($4)[%s:%s]', first, cardinality(times));
    ELSE
        first := cardinality(texts) + 1;
        texts := texts || ARRAY(SELECT element FROM jsonb_array_elements_text(operands) WITH ORDINALITY AS one (element, place) ORDER BY place);
        several := format('($3)[%s:%s]', first, cardinality(texts));
    END IF;
    statement := CASE
        WHEN type = 'texts' THEN format('(%s %s %s)', expression, CASE operator WHEN 'any' THEN '&&' ELSE '@>' END, several)
        WHEN takes_list THEN format('(%s = ANY (%s))', expression, several)
        ELSE format('(%s %s %s)', expression,
                    CASE operator WHEN 'gt' THEN '>' WHEN 'gte' THEN '>=' WHEN 'lt' THEN '<' WHEN 'lte' THEN '<=' ELSE '=' END,
                    regexp_replace(several, ':\d+\]$', ']'))
    END;
END $$;


-- What a condition asks of the table of items, as `search/where.py` has it.
CREATE FUNCTION embeddings.where_statement(
    collection text, filters jsonb, "where" jsonb, depth integer, INOUT columns text[], INOUT numbers numeric[],
    INOUT texts text[], INOUT times timestamptz[], OUT statement text
) LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    word text;
    value jsonb;
    conditions jsonb;
    part record;
    parts text[] := '{}';
    within text[];
BEGIN
    IF depth > 20 OR jsonb_typeof("where") <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('collection %s: where: %s', collection, CASE WHEN depth > 20
                THEN 'there are conditions within conditions, more than 20 deep'
                ELSE format('%s is no condition', left("where"::text, 60)) END),
            HINT = 'Write {"column": {"operator": value}}.';
    END IF;
    FOR word, value IN SELECT asked.key, asked.value FROM jsonb_each("where") AS asked LOOP
        within := '{}';
        IF word IN ('and', 'or') AND jsonb_typeof(value) <> 'array' THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('collection %s: where: `%s` takes a list of conditions, and not %s', collection, word, left(value::text, 60)),
                HINT = format('Write {"%s": [{"column": {"operator": value}}, …]}.', word);
        ELSIF word IN ('and', 'or', 'not') THEN
            conditions := CASE word WHEN 'not' THEN jsonb_build_array(value) ELSE value END;
            FOR value IN SELECT each FROM jsonb_array_elements(conditions) AS each LOOP
                part := embeddings.where_statement(collection, filters, value, depth + 1, columns, numbers, texts, times);
                columns := part.columns; numbers := part.numbers; texts := part.texts; times := part.times;
                within := within || format('(%s)', part.statement);
            END LOOP;
            parts := parts || CASE
                WHEN word = 'not' THEN format('(%s IS NOT TRUE)', within[1])
                WHEN within = '{}' THEN CASE word WHEN 'and' THEN 'true' ELSE 'false' END
                ELSE format('(%s)', array_to_string(within, format(' %s ', word))) END;
            CONTINUE;
        END IF;
        conditions := CASE jsonb_typeof(value) WHEN 'object' THEN value WHEN 'array' THEN jsonb_build_object('any', value)
                                               ELSE jsonb_build_object('eq', value) END;
        IF NOT filters ? word OR conditions = '{}' THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('collection %s: where: %s', collection, format(CASE WHEN filters ? word
                    THEN '%s is compared with nothing' ELSE 'there is no filter %s' END, to_json(left(word, 60)))),
                HINT = format('Declared under `filters:` in defs.yaml: %s.', coalesce(
                    (SELECT string_agg(format('%s (%s)', filter.key, filter.value ->> 'type'), ', ') FROM jsonb_each(filters) AS filter),
                    'none'));
        END IF;
        FOR part IN SELECT asked.key, asked.value FROM jsonb_each(conditions) AS asked LOOP
            part := embeddings.where_comparison(
                collection, word, filters -> word, part.key, part.value, columns, numbers, texts, times);
            columns := part.columns; numbers := part.numbers; texts := part.texts; times := part.times;
            parts := parts || part.statement;
        END LOOP;
    END LOOP;
    statement := CASE WHEN parts = '{}' THEN 'true' ELSE array_to_string(parts, ' AND ') END;
END $$;


-- How many items the planner expects to meet a condition. VOLATILE, since EXPLAIN counts as if it wrote something.
CREATE FUNCTION embeddings.expected_items(collection text, filters jsonb, "where" jsonb)
RETURNS numeric LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    asked record := embeddings.where_statement(collection, filters, "where", 0, '{}', '{}', '{}', '{}');
    plan json;
BEGIN
    EXECUTE format('EXPLAIN (FORMAT JSON) SELECT FROM embeddings.%I AS item WHERE %s', collection || '_item', asked.statement)
    INTO plan USING asked.columns, asked.numbers, asked.texts, asked.times;
    RETURN plan -> 0 -> 'Plan' ->> 'Plan Rows';
END $$;


-- The ANN index to ask for vectors of that name, and about how many vectors there are; no row if there is none.
CREATE FUNCTION embeddings.index_to_ask(collection text, fingerprint text, vector_name text, vector_bytes bigint)
RETURNS TABLE (method text, lists bigint, vectors bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH place AS (
        SELECT class.oid, class.relkind, to_regclass(format('embeddings.%I', $1 || '_hash_' || $2)) AS hash
        FROM pg_class AS class WHERE class.oid = to_regclass(format('embeddings.%I', $1 || '_vector_' || $2))
    ), kept AS (  -- the column of a table of ours, or that which the view shows
        SELECT place.oid AS relation, attnum FROM place JOIN pg_attribute ON attrelid = place.oid
        WHERE relkind = 'r' AND attname = 'embedding'
        UNION ALL
        SELECT refobjid, refobjsubid
        FROM place
        JOIN pg_rewrite AS rule ON rule.ev_class = place.oid
        JOIN pg_depend AS depends ON depends.classid = 'pg_rewrite'::regclass AND depends.objid = rule.oid
        JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
        JOIN pg_type AS type ON type.oid = atttypid
        WHERE relkind = 'v' AND depends.refclassid = 'pg_class'::regclass AND type.typname IN ('vector', 'halfvec')
    )
    SELECT method.amname::text,
           coalesce((SELECT option_value::bigint FROM pg_options_to_table(named.reloptions) WHERE option_name = 'lists'), 0),
           CASE place.relkind WHEN 'r' THEN pg_table_size(place.oid) / (vector_bytes + 90) ELSE pg_table_size(place.hash) / 80 END
    FROM place, kept
    JOIN pg_index AS index ON index.indrelid = kept.relation AND index.indkey[0] = kept.attnum
    JOIN pg_class AS named ON named.oid = index.indexrelid
    JOIN pg_am AS method ON method.oid = named.relam
    WHERE index.indisvalid AND index.indisready AND method.amname IN ('hnsw', 'ivfflat')
      AND (index.indpred IS NULL OR pg_get_expr(index.indpred, index.indrelid) = format('(vector_name = %L::text)', $3))
    ORDER BY named.relname
    LIMIT 1
$$;


-- The statement that gives the best $8 items of the nearest $7 texts; $1 to $4: of the condition, $5: the vector, $6: its
-- name, $9: how many texts of an index are asked whether their items match.
CREATE FUNCTION embeddings.nearest_statement(
    collection text, fingerprint text, condition text, storage text, dimension bigint, filtered boolean, by_index boolean)
RETURNS text LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT format(
        CASE WHEN filtered AND by_index THEN
            'WITH nearest AS MATERIALIZED (
                SELECT candidate.text_id, candidate.distance
                FROM (SELECT text_id, embedding OPERATOR(%4$I.<=>) $5::%4$I.%5$I(%6$s) AS distance
                      FROM embeddings.%1$I WHERE vector_name = $6 ORDER BY distance LIMIT $9) AS candidate
                WHERE EXISTS (SELECT FROM embeddings.%2$I AS text JOIN embeddings.%3$I AS item ON item.item_key = text.item_key
                              WHERE text.id = candidate.text_id AND (%7$s) OFFSET 0)
                ORDER BY candidate.distance FETCH FIRST $7 ROWS WITH TIES'
        ELSE
            'WITH nearest AS MATERIALIZED (
                SELECT vector.text_id, (vector.embedding OPERATOR(%4$I.<=>) $5::%4$I.%5$I(%6$s))'
            || CASE WHEN by_index THEN '' ELSE ' + 0' END || ' AS distance
                FROM embeddings.%1$I AS vector '
            || CASE WHEN filtered THEN
                'JOIN embeddings.%2$I AS text ON text.id = vector.text_id JOIN embeddings.%3$I AS item ON item.item_key = text.item_key '
               ELSE '' END
            || 'WHERE vector.vector_name = $6 AND (%7$s) ORDER BY distance FETCH FIRST $7 ROWS WITH TIES'
        END
        || '), best AS (
                SELECT DISTINCT ON (text.item_key) text.item_key, nearest.distance, text.id
                FROM nearest JOIN embeddings.%2$I AS text ON text.id = nearest.text_id
                WHERE nearest.distance <> ''NaN''
                ORDER BY text.item_key, nearest.distance, text.chunk
            ), hit AS (
                SELECT best.item_key, 1 - best.distance AS score, best.id
                FROM best JOIN embeddings.%3$I AS item ON item.item_key = best.item_key
                ORDER BY score DESC, best.item_key COLLATE "C" LIMIT $8
            )
            SELECT array_agg(item_key), array_agg(score), array_agg(id), (SELECT count(*) FROM nearest) FROM hit',
        collection || '_vector_' || fingerprint, collection || '_text', collection || '_item',
        (SELECT nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace WHERE extname = 'vector'),
        storage, dimension, condition)
$$;


-- The items nearest to a vector, by their nearest text; as `search/nearest.py` has them, with its figures.
CREATE FUNCTION embeddings.nearest_items(
    collection text, fingerprint text, query text, vector_name text, wanted bigint, "where" jsonb)
RETURNS TABLE (item_key text, score double precision, text_id bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET random_page_cost = 1.1 AS $$
DECLARE
    known record;
    asked record;
    ann record;
    names CONSTANT text[] := ARRAY['hnsw.ef_search', 'hnsw.iterative_scan', 'hnsw.max_scan_tuples', 'hnsw.scan_mem_multiplier',
                                   'ivfflat.probes', 'ivfflat.iterative_scan', 'enable_seqscan'];
    before jsonb;
    ours jsonb;
    filtered CONSTANT boolean := coalesce("where", 'null') NOT IN ('null', '{}');
    expected numeric;
    share numeric := 1;
    probes numeric := 20;
    texts bigint;
    given bigint;
    keys text[];
    scores double precision[];
    ids bigint[];
BEGIN
    SELECT * INTO STRICT known FROM embeddings.searched_by(collection, fingerprint);
    texts := wanted * known.texts_per_item;
    asked := embeddings.where_statement(
        collection, known.filters, CASE WHEN filtered THEN "where" ELSE '{}' END, 0, '{}', '{}', '{}', '{}');
    SELECT * INTO ann FROM embeddings.index_to_ask(
        collection, fingerprint, vector_name, 8 + known.dimension * CASE known.storage WHEN 'halfvec' THEN 2 ELSE 4 END);
    IF ann.vectors < 50000 THEN
        ann.method := NULL;
    END IF;
    IF filtered AND ann.method IS NOT NULL THEN
        texts := 2 * texts;
        expected := embeddings.expected_items(collection, known.filters, "where");
        share := least(1, greatest(expected, 1) / greatest(embeddings.expected_items(collection, known.filters, '{}'), 1));
        probes := least(greatest(20, ceil(40 * texts / share * ann.lists / ann.vectors)), greatest(ann.lists, 1));
        IF 6 * expected * known.texts_per_item
           <= 20 * texts / share + coalesce(0.5 * probes * ann.vectors / nullif(ann.lists, 0), 0) THEN
            ann.method := NULL;
        END IF;
    END IF;
    LOOP
        IF ann.method IS NOT NULL THEN
            ours := jsonb_build_object(
                'hnsw.ef_search', least(greatest(200, 2 * texts), 1000), 'hnsw.iterative_scan', 'relaxed_order',
                'hnsw.max_scan_tuples', 40000, 'hnsw.scan_mem_multiplier', 8, 'ivfflat.probes', probes,
                'ivfflat.iterative_scan', 'relaxed_order', 'enable_seqscan', 'off');
            SELECT jsonb_object_agg(name, current_setting(name)) INTO before
            FROM unnest(names) AS name WHERE current_setting(name, true) IS NOT NULL;
            PERFORM set_config(name, ours ->> name, true) FROM jsonb_object_keys(before) AS name;
        END IF;
        EXECUTE embeddings.nearest_statement(
            collection, fingerprint, asked.statement, known.storage, known.dimension, filtered, ann.method IS NOT NULL)
        INTO keys, scores, ids, given
        USING asked.columns, asked.numbers, asked.texts, asked.times, query, vector_name, texts, wanted,
              least(greatest(round(3 * texts / share), 1000), 40000)::bigint;
        IF ann.method IS NOT NULL THEN
            PERFORM set_config(key, value, true) FROM jsonb_each_text(before);
        END IF;
        EXIT WHEN cardinality(keys) >= wanted OR (given < texts AND ann.method IS NULL);
        IF given < texts THEN
            ann.method := NULL;
        ELSE
            texts := 4 * texts;
            IF texts > 20000 THEN
                ann.method := NULL;
            END IF;
        END IF;
    END LOOP;
    RETURN QUERY SELECT * FROM unnest(keys, scores, ids);
END $$;


-- The items that have any of the words, by their best text; as `search/by_tsvector.py` has them.
CREATE FUNCTION embeddings.items_by_words(
    collection text, fingerprint text, query text, vector_names text[], wanted bigint, "where" jsonb)
RETURNS TABLE (item_key text, score double precision, text_id bigint)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known record;
    asked record;
    filtered CONSTANT boolean := coalesce("where", 'null') NOT IN ('null', '{}');
    words tsquery;
    texts bigint;
    given bigint;
    keys text[];
    scores double precision[];
    ids bigint[];
BEGIN
    SELECT * INTO STRICT known FROM embeddings.searched_by(collection, fingerprint);
    SELECT string_agg('''' || replace(replace(lexeme, '\', '\\'), '''', '''''') || '''', ' | ')::tsquery INTO words
    FROM unnest(to_tsvector(
        (known.words ->> 'configuration')::regconfig,
        array_to_string(embeddings.query_words(
            query, ARRAY(SELECT jsonb_array_elements_text(known.words -> 'stop_words'))), ' ')));
    IF words IS NULL THEN
        RETURN;
    END IF;
    texts := wanted * known.texts_per_item + 10;
    asked := embeddings.where_statement(
        collection, known.filters, CASE WHEN filtered THEN "where" ELSE '{}' END, 0, '{}', '{}', '{}', '{}');
    LOOP
        EXECUTE format(
            'WITH ranked AS MATERIALIZED (
                SELECT words.text_id, ts_rank(words.words, $5, 1)::double precision AS score FROM embeddings.%1$I AS words '
            || CASE WHEN filtered THEN
                'JOIN embeddings.%2$I AS text ON text.id = words.text_id JOIN embeddings.%3$I AS item ON item.item_key = text.item_key '
               ELSE '' END
            || 'WHERE words.words @@ $5 AND words.vector_name = ANY ($6) AND (%5$s) ORDER BY score DESC, text_id LIMIT $7
            ), best AS (
                SELECT DISTINCT ON (text.item_key) text.item_key, ranked.score, text.id
                FROM ranked
                JOIN embeddings.%2$I AS text ON text.id = ranked.text_id
                JOIN embeddings.%4$I AS vector ON vector.text_id = ranked.text_id
                JOIN embeddings.%3$I AS item ON item.item_key = text.item_key
                ORDER BY text.item_key, ranked.score DESC, text.id
            ), hit AS (
                SELECT * FROM best ORDER BY score DESC, id LIMIT $8
            )
            SELECT array_agg(item_key), array_agg(score), array_agg(id), (SELECT count(*) FROM ranked) FROM hit',
            collection || '_text_words', collection || '_text', collection || '_item',
            collection || '_vector_' || fingerprint, asked.statement)
        INTO keys, scores, ids, given
        USING asked.columns, asked.numbers, asked.texts, asked.times, words, vector_names, texts, wanted;
        EXIT WHEN cardinality(keys) >= wanted OR given < texts;
        texts := 4 * texts;
    END LOOP;
    RETURN QUERY SELECT * FROM unnest(keys, scores, ids);
END $$;


-- What is asked, checked: the vector names, and the vector as the model's type can hold it. Raises what cannot be.
CREATE FUNCTION embeddings.checked_search(
    collection text, vector real[], fingerprint text, query text, k bigint, INOUT vectors text[], OUT usable text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    known record;
    length CONSTANT double precision := (SELECT sqrt(sum(number::double precision ^ 2)) FROM unnest(vector) AS number);
    wrong text;
    what_to_do text;
BEGIN
    IF collection IS NULL OR vector IS NULL OR fingerprint IS NULL OR query IS NULL OR k IS NULL THEN
        wrong := format('%s cannot be NULL', CASE WHEN collection IS NULL THEN 'collection' WHEN vector IS NULL THEN 'vector'
                                                  WHEN fingerprint IS NULL THEN 'fingerprint' WHEN query IS NULL THEN 'text' ELSE 'k' END);
        what_to_do := 'Give (collection, vector, fingerprint, text, k, where); of these k and where may be left out.';
    ELSIF k NOT BETWEEN 1 AND 1000 THEN
        wrong := format('k cannot be %s', k);
        what_to_do := 'It is a whole number from 1 to 1000.';
    ELSIF query !~ '[^\s\u200b-\u200f\u2060\ufeff]' THEN
        wrong := 'the text is blank';
        what_to_do := 'Say what to search for.';
    ELSIF NOT EXISTS (SELECT FROM embeddings.current_model(collection)) THEN
        wrong := 'there is no such collection, or it has no vectors yet';
        what_to_do := 'See `embeddings-pipeline collection list`.';
    END IF;
    IF wrong IS NULL THEN
        PERFORM embeddings.assert_model(collection, fingerprint);
        SELECT * INTO known FROM embeddings.searched_by(collection, fingerprint);
        IF NOT FOUND THEN
            wrong := 'how it is searched is not in the database yet';
            what_to_do := 'Run `embeddings-pipeline sync` once.';
        ELSIF known.words IS NULL THEN
            wrong := 'it has no lexical index, which a hybrid search needs';
            what_to_do := 'Add `words: {}` in defs.yaml, and sync.';
        ELSIF cardinality(vector) <> known.dimension THEN
            wrong := format('the vector has %s dimensions, and the model %s', cardinality(vector), known.dimension);
            what_to_do := 'embeddings.current_model() says which model a query is encoded with.';
        ELSIF length = 0 THEN
            wrong := 'the vector is zero, and has no direction';
            what_to_do := 'Encode the query with the model that embeddings.current_model() names.';
        ELSIF vectors <> '{}' AND NOT vectors <@ known.vectors THEN
            wrong := format('it has no vector %s', (SELECT name FROM unnest(vectors) AS name WHERE name <> ALL (known.vectors) OR name IS NULL LIMIT 1));
            what_to_do := format('It has %s.', array_to_string(known.vectors, ', '));
        END IF;
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('collection %s: %s', coalesce(left(collection, 60), 'NULL'), wrong), HINT = what_to_do;
    END IF;
    IF coalesce(vectors, '{}') = '{}' THEN
        vectors := known.vectors[:1];
    END IF;
    -- What is beyond the column's type is made shorter, or longer: a cosine is the same at any length.
    IF (CASE known.storage WHEN 'halfvec' THEN length NOT BETWEEN sqrt(known.dimension) * 6.2e-5 AND 65504
                           ELSE length NOT BETWEEN 1e-15 AND 1e18 END) THEN
        vector := ARRAY(SELECT (number / length)::real FROM unnest(vector) WITH ORDINALITY AS one (number, place) ORDER BY place);
    END IF;
    usable := '[' || array_to_string(vector, ',') || ']';
END $$;


-- The `k` best items by meaning and by words, best first: for each the text that it stands higher with. `vector`: the text's
-- under the model of that fingerprint; EMB01 if another one is current. "where": a condition on the columns of `filters:`.
-- vectors: vector names; left out, the first.
CREATE FUNCTION embeddings.hybrid_search(
    collection text, vector vector, fingerprint text, text text, k bigint DEFAULT 10, "where" jsonb DEFAULT NULL,
    vectors text[] DEFAULT NULL
) RETURNS SETOF embeddings.hybrid_search_hit
LANGUAGE plpgsql STABLE ROWS 10 SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    checked record := embeddings.checked_search($1, $2::real[], $3, $4, $5, $7);
    fusion jsonb;
    candidates CONSTANT bigint := greatest(k, least(greatest(50, 5 * k), 100));
    has_words boolean;
BEGIN
    SELECT words INTO fusion FROM embeddings.searched_by($1, $3);
    -- The index is made last: its being there says that every text has its words.
    SELECT obj_description(class.oid, 'pg_class') = fusion ->> 'configuration' AND index.indisvalid AND index.indisready
    INTO has_words
    FROM pg_class AS class
    JOIN pg_index AS index ON index.indrelid = class.oid
    WHERE class.oid = to_regclass(format('embeddings.%I', $1 || '_text_words'))
      AND index.indexrelid = to_regclass(format('embeddings.%I', $1 || '_text_words_index'));
    IF has_words IS NOT TRUE THEN
        RAISE WARNING 'collection %: the words of its texts are not in PostgreSQL yet: vectors alone answer', $1
            USING HINT = '`embeddings-pipeline sync` brings them there.';
    END IF;
    RETURN QUERY EXECUTE format(
        'WITH near AS (
            SELECT DISTINCT ON (hit.item_key) hit.*
            FROM unnest($5::text[]) WITH ORDINALITY AS name (name, place)
            CROSS JOIN LATERAL embeddings.nearest_items($1, $2, $3, name.name, $6, $7) AS hit
            JOIN embeddings.%1$I AS text ON text.id = hit.text_id
            ORDER BY hit.item_key, hit.score DESC, text.chunk, name.place
        ), dense AS (
            SELECT *, row_number() OVER (ORDER BY score DESC, item_key COLLATE "C") AS rank FROM near ORDER BY rank LIMIT $6
        ), words AS (
            SELECT *, row_number() OVER (ORDER BY score DESC, text_id) AS rank
            FROM embeddings.items_by_words($1, $2, $4, $5, $6, $7) WHERE $8
        ), fused AS (
            SELECT item_key, CASE WHEN words.rank < dense.rank OR dense.rank IS NULL THEN words.text_id ELSE dense.text_id END AS text_id,
                   CASE WHEN $8 THEN coalesce($9 / ($11 + dense.rank), 0) + coalesce($10 / ($11 + words.rank), 0)
                        ELSE dense.score END AS score,
                   dense.rank
            FROM dense FULL JOIN words USING (item_key)
            ORDER BY score DESC, dense.rank NULLS LAST, item_key COLLATE "C"
            LIMIT $12
        )
        SELECT fused.item_key, fused.score, item.payload, text.text, text.vector_name, text.chunk
        FROM fused
        JOIN embeddings.%1$I AS text ON text.id = fused.text_id
        JOIN embeddings.%2$I AS item ON item.item_key = fused.item_key
        ORDER BY fused.score DESC, fused.rank NULLS LAST, fused.item_key COLLATE "C"',
        $1 || '_text', $1 || '_item')
    USING $1, $3, checked.usable, $4, checked.vectors, candidates, $6, has_words IS TRUE,
          (fusion ->> 'dense')::double precision, (fusion ->> 'text')::double precision,
          (fusion ->> 'k')::double precision, k;
END $$;

GRANT EXECUTE ON FUNCTION
    embeddings.searched_by(text, text), embeddings.hybrid_search(text, vector, text, text, bigint, jsonb, text[]) TO PUBLIC;
