-- Names of stored models. An artifact is an object in the artifact store, under its digest.

CREATE TABLE models (
    id TEXT PRIMARY KEY,
    digest TEXT NOT NULL,             -- sha256 of the artifact
    record TEXT NOT NULL              -- JSON
);

CREATE INDEX models_digest ON models (digest);

-- Second names, which move from model to model.
CREATE TABLE aliases (
    alias TEXT PRIMARY KEY,
    model TEXT NOT NULL REFERENCES models (id)
);

CREATE INDEX aliases_model ON aliases (model);

-- Counts changes of the two tables above: replicas look at it to learn of new names.
CREATE TABLE catalog (
    id BIGINT PRIMARY KEY,
    version BIGINT NOT NULL
);

INSERT INTO catalog (id, version) VALUES (1, 0);

-- Artifacts that no model named when somebody looked. Whoever names one takes it off this list;
-- whoever deletes one holds its row meanwhile.
CREATE TABLE condemned (
    digest TEXT PRIMARY KEY
);
