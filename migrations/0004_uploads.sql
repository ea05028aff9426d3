-- Checkpoints and data sets that clients bring, on their way and whole. Their content lies in the
-- artifact store, in parts.

CREATE TABLE uploads (
    id TEXT PRIMARY KEY,              -- ULID
    kind TEXT NOT NULL,               -- checkpoint, dataset
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,             -- of the content; empty for images that come one by one
    config TEXT NOT NULL,             -- config.json of a checkpoint
    bytes BIGINT NOT NULL,            -- announced; 0 for images that come one by one
    images BIGINT NOT NULL,           -- announced, of images that come one by one
    received_bytes BIGINT NOT NULL,
    received_images BIGINT NOT NULL,
    writer TEXT NOT NULL,             -- the stream that may add to it
    created_ms BIGINT NOT NULL,
    touched_ms BIGINT NOT NULL,
    summary TEXT,                     -- JSON, once it is whole and checked
    UNIQUE (kind, name)
);

CREATE TABLE upload_parts (
    upload_id TEXT NOT NULL REFERENCES uploads (id) ON DELETE CASCADE,
    position BIGINT NOT NULL,         -- of its first byte in the content
    bytes BIGINT NOT NULL,
    digest TEXT NOT NULL,             -- sha256 of the object
    PRIMARY KEY (upload_id, position)
);

CREATE INDEX upload_parts_digest ON upload_parts (digest);

-- Whoever takes space holds this row: the quota is not overdrawn by two at once.
CREATE TABLE upload_gate (
    id BIGINT PRIMARY KEY
);

INSERT INTO upload_gate (id) VALUES (1);
