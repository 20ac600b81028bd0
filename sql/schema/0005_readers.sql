-- Who may read the view of a collection may ask which model it shows: these functions need no right of their own.

CREATE OR REPLACE FUNCTION embeddings.current_model(collection_name text)
RETURNS TABLE (profile text, fingerprint text, dimension bigint)
LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT model.profile ->> 'name', model.fingerprint, model.dimension
    FROM embeddings.collection
    JOIN embeddings.model ON model.collection = collection.name AND model.fingerprint = collection.fingerprint
    WHERE collection.name = collection_name
$$;

GRANT EXECUTE ON FUNCTION embeddings.current_model(text), embeddings.assert_model(text, text) TO PUBLIC;
