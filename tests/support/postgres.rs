//! A throw-away PostgreSQL on loopback: started by the first test that asks, gone with the process.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use sqlx::{AnyConnection, AssertSqlSafe, Connection as _, Executor as _};

/// Ends, and removes what it wrote, when its standard input is closed: however this process ends.
const SCRIPT: &str = r#"
set -euo pipefail
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
work=$(mktemp -d)
as=()
if [ "$(id -u)" -eq 0 ]; then
  chown postgres "$work"
  as=(setpriv --reuid=postgres --regid=postgres --clear-groups)
fi
cd "$work"
"${as[@]}" "$bin/initdb" -D "$work/data" -U vitq --auth=trust --no-sync -E UTF8 --locale=C >&2
"${as[@]}" "$bin/postgres" -D "$work/data" -h 127.0.0.1 -p "$1" -k "$work" \
  -c max_connections=200 >&2 &
server=$!
trap 'kill -INT $server 2>/dev/null || true; wait $server || true; rm -rf "$work"' EXIT
for _ in $(seq 300); do
  kill -0 $server 2>/dev/null || exit 1
  if "$bin/pg_isready" -q -h 127.0.0.1 -p "$1"; then
    echo ready
    cat >/dev/null
    exit
  fi
  sleep 0.1
done
exit 1
"#;

struct Server {
    port: u16,
    _script: Child,
}

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    // Somebody else may take the free port first.
    let tries = || (0..3).find_map(|_| start());
    SERVER.get_or_init(|| {
        tries().expect("PostgreSQL did not start: is Debian's `postgresql` installed?")
    })
}

fn start() -> Option<Server> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut script = Command::new("bash")
        .args(["-c", SCRIPT, "postgres", &port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(script.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (line == "ready\n").then_some(Server { port, _script: script })
}

/// The URL of a new, empty database.
pub(crate) async fn database() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let Server { port, .. } = tokio::task::spawn_blocking(server).await.unwrap();
    let name = format!("test{}", NEXT.fetch_add(1, Ordering::Relaxed));
    sqlx::any::install_default_drivers();
    let url = |name: &str| format!("postgres://vitq@127.0.0.1:{port}/{name}");
    let mut connection = AnyConnection::connect(&url("postgres")).await.unwrap();
    connection.execute(AssertSqlSafe(format!("CREATE DATABASE {name}"))).await.unwrap();
    url(&name)
}
