-- The words of a text, for searches by words. White space and punctuation part them; and those that a hyphen, an apostrophe
-- or the like joins are there as one word, too: `B-52` is b, 52 and b52. The same as `index/terms.py`, but for what the
-- server's parser leaves out (emoji). A tsvector has at most a megabyte, so a text's first 100,000 characters count. Tables
-- have what the function returns, so that never changes: a change is a function of another name.

CREATE FUNCTION embeddings.words(config regconfig, value text)
RETURNS tsvector LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT pg_catalog.to_tsvector(
        config,
        pg_catalog.regexp_replace(
            pg_catalog.left(value, 100000),
            '[!-/:-@\[-`{-~\u00a0-\u00bf\u060c\u061b\u061f\u0964\u2000-\u200b\u200e-\u206f\u3000-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20]+',
            ' ', 'g')
        || coalesce(
            (SELECT pg_catalog.string_agg(' ' || pg_catalog.translate(joined[1], '''-./_@&' || U&'\2010\2011\2019\02BC', ''), '')
             FROM pg_catalog.regexp_matches(
                pg_catalog.left(value, 100000),
                '[^\s!-/:-@\[-`{-~\u00a0-\u00bf\u060c\u061b\u061f\u0964\u2000-\u200b\u200e-\u206f\u3000-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20]+(?:[''./_@&\u2010\u2011\u2019\u02bc-][^\s!-/:-@\[-`{-~\u00a0-\u00bf\u060c\u061b\u061f\u0964\u2000-\u200b\u200e-\u206f\u3000-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20]+)+',
                'g') AS joined),
            ''))
$$;

-- Has the words of a collection's texts follow the texts, whoever commits. The trigger's argument: the configuration.
CREATE FUNCTION embeddings.keep_words() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        EXECUTE pg_catalog.format(
            'INSERT INTO embeddings.%I (text_id, vector_name, words) '
            'SELECT id, vector_name, embeddings.words(%L, text) FROM new_texts WHERE NOT blank '
            'ON CONFLICT (text_id) DO NOTHING', TG_TABLE_NAME || '_words', TG_ARGV[0]);
    ELSE
        EXECUTE pg_catalog.format(
            'DELETE FROM embeddings.%I AS words USING gone_texts AS gone WHERE words.text_id = gone.id',
            TG_TABLE_NAME || '_words');
    END IF;
    RETURN NULL;
END $$;
