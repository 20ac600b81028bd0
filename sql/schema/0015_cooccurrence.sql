-- What the same people liked. Both are written anew as a whole, from the interactions that a definition names.

CREATE TABLE embeddings.cooccurrence (
    collection text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    item_key   text COLLATE "C" NOT NULL,
    other_key  text COLLATE "C" NOT NULL,                -- one of those that most of the same people liked
    score      real NOT NULL,                            -- the cosine of both items' people
    PRIMARY KEY (collection, item_key, other_key)
);

CREATE TABLE embeddings.liked (
    collection text NOT NULL REFERENCES embeddings.collection ON DELETE CASCADE ON UPDATE CASCADE,
    item_key   text COLLATE "C" NOT NULL,
    people     bigint NOT NULL,
    PRIMARY KEY (collection, item_key)
);
CREATE INDEX liked_people ON embeddings.liked (collection, people);
