-- The values that searches filter by, from an item's payload: each function gives NULL for what is none of its type. Indexes
-- are on these expressions, so what a function returns never changes, and no value is too long for an index. A change is a
-- function of another name.

CREATE FUNCTION embeddings.filter_number(value jsonb)
RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN pg_catalog.length(value #>> '{}') > 500 THEN NULL
        WHEN pg_catalog.jsonb_typeof(value) = 'number' THEN value::numeric
        WHEN pg_catalog.jsonb_typeof(value) = 'string' AND (value #>> '{}') ~ '^[+-]?[0-9]+([.][0-9]+)?([eE][+-]?[0-9]{1,2})?$'
            THEN (value #>> '{}')::numeric
    END
$$;

CREATE FUNCTION embeddings.filter_boolean(value jsonb)
RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE value #>> '{}' WHEN 'true' THEN true WHEN 'false' THEN false END
$$;

CREATE FUNCTION embeddings.filter_text(value jsonb)
RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN pg_catalog.jsonb_typeof(value) IN ('string', 'number', 'boolean') THEN value #>> '{}' END
$$;

-- A list, or one text that is parted at the separator ('': never); without the white space around each. Parts of more than 500 characters are left out.
CREATE FUNCTION embeddings.filter_texts(value jsonb, separator text)
RETURNS text[] LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    parts text[];
BEGIN
    IF pg_catalog.jsonb_typeof(value) = 'array' THEN
        parts := ARRAY(SELECT pg_catalog.jsonb_array_elements_text(value));
    ELSIF pg_catalog.jsonb_typeof(value) = 'string' THEN
        parts := pg_catalog.string_to_array(value #>> '{}', nullif(separator, ''));
        IF separator = '' THEN
            parts := ARRAY[value #>> '{}'];
        END IF;
    ELSE
        RETURN NULL;
    END IF;
    RETURN ARRAY(SELECT trimmed FROM pg_catalog.unnest(parts) AS part, pg_catalog.btrim(part, E' \t\n\r\f\x0B') AS trimmed
                 WHERE pg_catalog.length(part) <= 500 AND trimmed <> '');
END $$;

-- A date or a time; without a zone it is UTC's. No subtransaction may begin in a parallel worker.
CREATE FUNCTION embeddings.filter_timestamp(value jsonb)
RETURNS timestamptz LANGUAGE plpgsql IMMUTABLE PARALLEL RESTRICTED SET TimeZone = 'UTC' AS $$
BEGIN
    IF pg_catalog.jsonb_typeof(value) = 'string' AND (value #>> '{}') ~ '^-?[0-9]{4,6}-[0-9]{2}-[0-9]{2}|^-?infinity$' THEN
        RETURN (value #>> '{}')::timestamptz;
    END IF;
    RETURN NULL;
EXCEPTION WHEN data_exception THEN
    RETURN NULL;
END $$;

GRANT EXECUTE ON FUNCTION
    embeddings.filter_number(jsonb), embeddings.filter_boolean(jsonb), embeddings.filter_text(jsonb),
    embeddings.filter_texts(jsonb, text), embeddings.filter_timestamp(jsonb) TO PUBLIC;
