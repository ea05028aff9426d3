-- Who this database is, for stores that it shares with no other database: nobody else's objects are garbage.

CREATE TABLE installation (
    only_row BIGINT NOT NULL PRIMARY KEY CHECK (only_row = 1),
    id TEXT NOT NULL
);
