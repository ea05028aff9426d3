//! The SQL database: SQLite in one file, or PostgreSQL. Both run the same statements; what differs
//! is in this file.

use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use sqlx::any::{AnyConnectOptions, AnyPoolOptions, AnyRow};
use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::{
    Any, AnyPool, AssertSqlSafe, Connection as _, Executor as _, Row as _, SqlSafeStr as _,
    Transaction,
};

use crate::error::{Error, Result};

/// Schema changes in order: version, name, text.
const MIGRATIONS: [(i64, &str, &str); 8] = [
    (1, "jobs", include_str!("../migrations/0001_jobs.sql")),
    (2, "models", include_str!("../migrations/0002_models.sql")),
    (3, "units", include_str!("../migrations/0003_units.sql")),
    (4, "uploads", include_str!("../migrations/0004_uploads.sql")),
    (5, "principals", include_str!("../migrations/0005_principals.sql")),
    (6, "traces", include_str!("../migrations/0006_traces.sql")),
    (7, "shards", include_str!("../migrations/0007_shards.sql")),
    (8, "installation", include_str!("../migrations/0008_installation.sql")),
];
/// Connections at once unless somebody says otherwise; on SQLite, readers beside the one writer.
pub const CONNECTIONS: u32 = 8;
/// How long a statement waits for a connection before the database counts as unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// For how long a process that starts waits for PostgreSQL, as during a failover, and how long between
/// two tries.
const PATIENCE: Duration = Duration::from_secs(120);
const RETRY: Duration = Duration::from_secs(1);
/// Of every SQLite connection: readers do not block the writer, a commit is on the disk, writers
/// queue up.
const SQLITE_SETTINGS: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
     PRAGMA foreign_keys = ON; PRAGMA busy_timeout = 30000;";

/// A database with the current schema.
#[derive(Clone, Debug)]
pub struct Database {
    pool: AnyPool,
    dialect: Dialect,
}

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// SQLite.
    Sqlite,
    /// PostgreSQL.
    Postgres,
}

/// Whether [`Database::open`] would understand a URL; nobody is asked.
///
/// # Errors
/// `InvalidArgument` on `database`.
pub fn check_url(url: &str) -> Result<()> {
    parse_url(url).map(drop)
}

fn parse_url(url: &str) -> Result<(Dialect, AnyConnectOptions)> {
    let dialect = match url.split_once(':') {
        Some(("sqlite", _)) => Dialect::Sqlite,
        Some(("postgres" | "postgresql", _)) => Dialect::Postgres,
        _ => return Err(Error::invalid("database", "must be a postgres:// or sqlite:// URL")),
    };
    // The URL may hold a password: it is not repeated.
    let options = url.parse().map_err(|_| Error::invalid("database", "is not a usable URL"))?;
    Ok((dialect, options))
}

impl Database {
    /// Opens, or creates, the SQLite file.
    ///
    /// # Errors
    /// As [`Database::open`].
    pub async fn file(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).map_err(|error| Error::io(path, error))?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-~".contains(&b);
        let encoded: String = path
            .as_os_str()
            .as_encoded_bytes()
            .iter()
            .map(|b| if plain(*b) { char::from(*b).to_string() } else { format!("%{b:02X}") })
            .collect();
        Self::open(&format!("sqlite://{encoded}?mode=rwc"), CONNECTIONS).await
    }

    /// Opens a database, and tries again for two minutes while PostgreSQL cannot be reached.
    ///
    /// # Errors
    /// As [`Database::open`]; what time does not mend is told at once.
    pub async fn wait_for(url: &str, connections: u32) -> Result<Self> {
        let started = Instant::now();
        loop {
            let opened = Self::open(url, connections).await;
            // A file that cannot be opened does not come back by itself.
            let Err(Error::Unavailable { reason, .. }) = &opened else { return opened };
            if url.starts_with("sqlite") || started.elapsed() >= PATIENCE {
                return opened;
            }
            tracing::warn!(reason, "not ready: the database cannot be reached, trying again");
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Connects to `sqlite://…` or `postgres://…`, with so many connections at most, and brings the
    /// schema up to date.
    ///
    /// # Errors
    /// `InvalidArgument` on `database` for another URL; `Unavailable` when it cannot be reached;
    /// `FailedPrecondition` when its schema is of a newer version.
    pub async fn open(url: &str, connections: u32) -> Result<Self> {
        sqlx::any::install_default_drivers();
        let (dialect, options) = parse_url(url)?;
        let pool = AnyPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    if dialect == Dialect::Sqlite {
                        connection.execute(SQLITE_SETTINGS).await?;
                    }
                    Ok(())
                })
            })
            .after_release(move |connection, _| {
                Box::pin(async move {
                    if dialect == Dialect::Postgres {
                        return Ok(true);
                    }
                    // Behind a rollback that is still on its way.
                    connection.ping().await?;
                    // SQLite ends a transaction by itself when the disk is full, and refuses the
                    // rollback: the driver then takes the transaction for open, and begins no other.
                    Ok(!connection.is_in_transaction())
                })
            })
            .connect_with(options)
            .await
            .map_err(failed)?;
        let database = Self { pool, dialect };
        database.migrate().await?;
        Ok(database)
    }

    async fn migrate(&self) -> Result<()> {
        let bytes = match self.dialect {
            Dialect::Sqlite => "BLOB",
            Dialect::Postgres => "BYTEA",
        };
        let migrations = MIGRATIONS.map(|(version, name, text)| {
            let sql = AssertSqlSafe(text.replace("{bytes}", bytes)).into_sql_str();
            Migration::new(version, name.into(), MigrationType::Simple, sql, false)
        });
        Migrator::with_migrations(migrations.into()).run(&self.pool).await.map_err(|error| {
            if let MigrateError::Execute(error) = error {
                return failed(error);
            }
            Error::FailedPrecondition { reason: format!("the database: {error}") }
        })
    }

    /// What is spoken.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Where single statements run.
    pub fn pool(&self) -> &AnyPool {
        &self.pool
    }

    /// Begins a transaction that will write.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn write(&self) -> Result<Transaction<'static, Any>> {
        match self.dialect {
            // A transaction that only later turns out to write could find itself outdated.
            Dialect::Sqlite => self.pool.begin_with("BEGIN IMMEDIATE").await,
            Dialect::Postgres => self.pool.begin().await,
        }
        .map_err(failed)
    }

    /// Who this database is: an id that no other one has, and that copies of it keep.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn installation(&self) -> Result<String> {
        let sql = "INSERT INTO installation (only_row, id) VALUES (1, $1) \
                   ON CONFLICT (only_row) DO NOTHING";
        let id = ulid::Ulid::generate().to_string();
        sqlx::query(sql).bind(id).execute(&self.pool).await.map_err(failed)?;
        let query = sqlx::query_scalar("SELECT id FROM installation");
        query.fetch_one(&self.pool).await.map_err(failed)
    }

    /// The database's clock in milliseconds since the Unix epoch, as an expression.
    pub fn now(&self) -> &'static str {
        match self.dialect {
            Dialect::Sqlite => "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
            Dialect::Postgres => "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)",
        }
    }

    /// The database's clock in milliseconds since the Unix epoch: what leases and times go by.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn clock(&self, tx: &mut Transaction<'static, Any>) -> Result<i64> {
        let sql = AssertSqlSafe(format!("SELECT {}", self.now()));
        sqlx::query_scalar(sql).fetch_one(&mut **tx).await.map_err(failed)
    }

    /// Locks the selected rows and passes over those that somebody else holds. On SQLite a write
    /// transaction is alone anyway.
    pub fn skip_locked(&self) -> &'static str {
        match self.dialect {
            Dialect::Sqlite => "",
            Dialect::Postgres => " FOR UPDATE SKIP LOCKED",
        }
    }

    /// Makes others wait for the selected rows. On SQLite a write transaction is alone anyway.
    pub fn for_update(&self) -> &'static str {
        match self.dialect {
            Dialect::Sqlite => "",
            Dialect::Postgres => " FOR UPDATE",
        }
    }

    /// Closes all connections.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// A value of a row.
///
/// # Errors
/// `Internal` when it is not of this type.
pub fn column<'r, T>(row: &'r AnyRow, index: usize) -> Result<T>
where
    T: sqlx::Decode<'r, Any> + sqlx::Type<Any>,
{
    row.try_get(index).map_err(failed)
}

/// A count in a row.
///
/// # Errors
/// `Internal` when it is none.
pub fn number(row: &AnyRow, index: usize) -> Result<u64> {
    u64::try_from(column::<i64>(row, index)?).map_err(|_| broken())
}

/// A point in time in a row.
///
/// # Errors
/// `Internal` when it is none.
pub fn time(row: &AnyRow, index: usize) -> Result<Timestamp> {
    from_ms(column(row, index)?)
}

/// A point in time as the database has it.
///
/// # Errors
/// `Internal` for an impossible one.
pub fn from_ms(ms: i64) -> Result<Timestamp> {
    Timestamp::from_millisecond(ms).map_err(|_| broken())
}

/// A duration as the database has it.
pub fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4)
}

/// Somebody else wrote into the database.
pub fn broken() -> Error {
    Error::internal("a row of the database is not as it was written")
}

/// Whether a row with this key is there already.
pub fn is_duplicate(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation)
}

/// A failed statement as the crate's error.
pub fn failed(error: sqlx::Error) -> Error {
    let code = error.as_database_error().and_then(|error| error.code().map(String::from));
    match code.as_deref() {
        // SQLITE_FULL and PostgreSQL's disk_full.
        Some("13" | "53100") => Error::io("database", std::io::ErrorKind::StorageFull.into()),
        // SQLITE_BUSY, SQLITE_IOERR and its kinds, SQLITE_CANTOPEN; of PostgreSQL: connection,
        // resources, serialization and deadlock, shutdown.
        Some(code)
            if ["5", "10", "14", "40001", "40P01"].contains(&code)
                || code.parse::<u32>().is_ok_and(|code| code & 0xff == 10)
                || ["08", "53", "57"].iter().any(|class| code.starts_with(class)) =>
        {
            Error::Unavailable { what: "database", reason: error.to_string() }
        }
        Some(_) => Error::internal(format!("database: {error}")),
        None if is_out_of_reach(&error) => {
            Error::Unavailable { what: "database", reason: error.to_string() }
        }
        None => Error::internal(format!("database: {error}")),
    }
}

fn is_out_of_reach(error: &sqlx::Error) -> bool {
    use sqlx::Error::{Io, PoolClosed, PoolTimedOut, Protocol, Tls, WorkerCrashed};
    matches!(error, Io(_) | Tls(_) | Protocol(_) | PoolTimedOut | PoolClosed | WorkerCrashed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_created_once_and_keeps_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("odd name %41?#.sqlite");
        let database = Database::file(&path).await.unwrap();
        let insert = "INSERT INTO job_requests VALUES ('r', 'no such job', 'h')";
        assert!(database.pool().execute(insert).await.is_err(), "foreign keys are checked");
        let mode = database.pool().fetch_one("PRAGMA synchronous").await.unwrap();
        assert_eq!(mode.get::<i64, _>(0), 2, "FULL");
        database.close().await;
        assert!(path.is_file());
        let again = Database::file(&path).await.unwrap();
        again.pool().fetch_all("SELECT * FROM jobs").await.unwrap();
    }

    #[tokio::test]
    async fn a_disk_that_was_full_for_a_moment_leaves_no_broken_connection() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::file(&folder.path().join("db")).await.unwrap();
        let insert = "INSERT INTO condemned (digest) VALUES (hex(randomblob(100000)))";
        for _ in 0..3 {
            let mut tx = database.write().await.unwrap();
            // Holds for this connection alone.
            tx.execute("PRAGMA max_page_count = 1").await.unwrap();
            let error = failed(tx.execute(insert).await.unwrap_err());
            assert!(error.is_disk_full(), "{error}");
        }
        // All that there may be at once: a broken one would be among them.
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            connections.push(database.pool().acquire().await.unwrap());
        }
        assert!(connections.iter().all(|connection| !connection.is_in_transaction()));
        drop(connections);
        let mut tx = database.write().await.unwrap();
        tx.execute(insert).await.unwrap();
        tx.commit().await.unwrap();
    }

    #[tokio::test]
    async fn the_clock_is_the_wall_clock_in_milliseconds() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::file(&folder.path().join("db")).await.unwrap();
        let sql = AssertSqlSafe(format!("SELECT {}", database.now()));
        let found: i64 = sqlx::query_scalar(sql).fetch_one(database.pool()).await.unwrap();
        let expected = jiff::Timestamp::now().as_millisecond();
        assert!((expected - 5000..=expected).contains(&found), "{found} {expected}");
    }

    #[tokio::test]
    async fn unusable_urls_and_places_are_named() {
        for url in ["mysql://x", "", "postgres", "sqlite"] {
            let error = Database::open(url, CONNECTIONS).await.unwrap_err();
            let Error::InvalidArgument { field, .. } = error else { panic!("{url}: {error}") };
            assert_eq!(field, "database");
        }
        let error = Database::file(Path::new("/nowhere/at/all.sqlite")).await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    }

    /// Listens as PostgreSQL does, but drops the first connection and refuses the second one's user.
    #[tokio::test]
    async fn a_database_out_of_reach_is_tried_again_and_a_refusal_is_told_at_once() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            drop(listener.accept().await.unwrap());
            let (mut connection, _) = listener.accept().await.unwrap();
            assert!(connection.read(&mut [0; 1024]).await.unwrap() > 0);
            let fields = b"SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed\0\0";
            let length = u32::try_from(fields.len() + 4).unwrap().to_be_bytes();
            connection.write_all(&[&b"E"[..], &length, fields].concat()).await.unwrap();
            // To the end, so that the answer is not lost.
            while connection.read(&mut [0; 1024]).await.is_ok_and(|bytes| bytes > 0) {}
        });
        let url = format!("postgres://vitq@127.0.0.1:{port}/vitq?sslmode=disable");
        let error = Database::wait_for(&url, 1).await.unwrap_err();
        let Error::Internal { .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains("password authentication failed"), "{error}");
        server.await.unwrap();
    }
}
