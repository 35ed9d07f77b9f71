use super::*;

const NOW_NS: u64 = 1_700_000_000_123_000_000;

fn snapshot(statements: &str) -> (tempfile::TempDir, Snapshot) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db.sqlite");
    Connection::open(&path).unwrap().execute_batch(statements).unwrap();
    let snapshot = Snapshot::load(&path, &Limits::default()).unwrap();
    (folder, snapshot)
}

fn open(snapshot: &Snapshot) -> Database {
    Database::open(snapshot, &Limits::default(), Seed::new(7), NOW_NS).unwrap()
}

fn empty() -> Database {
    open(&snapshot("").1)
}

fn one(database: &mut Database, sql: &str) -> Value {
    database.query(sql, &[], NOW_NS).unwrap_or_else(|error| panic!("{sql}: {error}")).rows.remove(0).remove(0)
}

fn text(database: &mut Database, sql: &str) -> String {
    match one(database, sql) {
        Value::Text(text) => text,
        other => panic!("{sql}: {other:?}"),
    }
}

#[test]
fn what_one_rollout_writes_no_other_sees() {
    let (folder, snapshot) = snapshot("CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, NULL)");
    let mut first = open(&snapshot);
    assert_eq!(first.execute("INSERT INTO t VALUES (?, ?)", &[Value::Integer(3), Value::Text("y".into())], 0), Ok(1));
    assert_eq!(first.execute("UPDATE t SET b = 'z'", &[], 0), Ok(3));
    assert_eq!(one(&mut first, "SELECT count(*) FROM t"), Value::Integer(3));
    let mut second = open(&snapshot);
    let rows = second.query("SELECT a, b FROM t ORDER BY a", &[], 0).unwrap();
    assert_eq!(rows.columns, ["a", "b"]);
    assert_eq!(
        rows.rows,
        [[Value::Integer(1), Value::Text("x".into())], [Value::Integer(2), Value::Null]],
        "the snapshot is as it was"
    );
    let path = folder.path().join("db.sqlite");
    assert_eq!(Snapshot::load(&path, &Limits::default()).unwrap().hash(), snapshot.hash(), "and so is the file");
}

#[test]
fn nothing_in_sql_reaches_a_file() {
    let (folder, snapshot) = snapshot("CREATE TABLE t (a)");
    let mut database = open(&snapshot);
    let target = folder.path().join("written");
    let target = target.display();
    for statement in [
        format!("ATTACH '{target}' AS other"),
        "ATTACH ':memory:' AS other".to_owned(),
        "DETACH main".to_owned(),
        format!("VACUUM INTO '{target}'"),
        "VACUUM".to_owned(),
        "SELECT load_extension('x')".to_owned(),
        format!("PRAGMA temp_store_directory = '{target}'"),
        "PRAGMA writable_schema = 1".to_owned(),
        "PRAGMA max_page_count = 1000000000".to_owned(),
        "PRAGMA hard_heap_limit = 1".to_owned(),
        "PRAGMA journal_mode = WAL".to_owned(),
        "PRAGMA user_version = 3".to_owned(),
        "SELECT fts3_tokenizer('simple')".to_owned(),
        "CREATE VIRTUAL TABLE temp.d USING dbstat(main)".to_owned(),
    ] {
        match database.execute(&statement, &[], 0) {
            Err(SqliteError::Denied(text)) => assert!(text.contains("granted database"), "{text}"),
            other => panic!("{statement}: {other:?}"),
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "only the database is there");
    for statement in ["SELECT writefile('x', 'y')", "SELECT readfile('/etc/passwd')", "SELECT edit('x')"] {
        assert!(
            matches!(database.query(statement, &[], 0), Err(SqliteError::Sql(text)) if text.contains("no such function"))
        );
    }
    // What only tells something is there.
    assert_eq!(database.query("PRAGMA table_info(t)", &[], 0).unwrap().rows.len(), 1);
    database.execute("CREATE VIRTUAL TABLE f USING fts5(words)", &[], 0).unwrap();
}

#[test]
fn endless_statements_end_at_the_same_step() {
    let endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c";
    let limit = SqliteError::LimitReached { name: "sqlite_steps_max", value: 200_000 };
    let reached = |_| {
        let limits = Limits { sqlite_steps_max: 200_000, ..Limits::default() };
        let mut database = Database::open(&snapshot("CREATE TABLE t (n)").1, &limits, Seed::new(1), 0).unwrap();
        assert_eq!(database.query(endless, &[], 0), Err(limit.clone()));
        let rows = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) INSERT INTO t SELECT n FROM c";
        assert_eq!(database.execute(rows, &[], 0), Err(limit.clone()));
        // Undone as a whole, and the next statement has steps of its own.
        assert_eq!(one(&mut database, "SELECT count(*) FROM t"), Value::Integer(0));
        // Where it stopped shows in how many numbers it has drawn.
        let draws = endless.replace("count(*)", "max(random())");
        assert_eq!(database.query(&draws, &[], 0), Err(limit.clone()));
        one(&mut database, "SELECT random()")
    };
    assert_eq!(reached(0), reached(1));
}

#[test]
fn a_statement_that_nobody_waits_for_ends() {
    let limits = Limits { sqlite_steps_max: u64::MAX, ..Limits::default() };
    let mut database = Database::open(&snapshot("").1, &limits, Seed::new(1), 0).unwrap();
    database.cancelled().store(true, Ordering::Relaxed);
    let endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c";
    assert_eq!(database.query(endless, &[], 0), Err(SqliteError::Cancelled));
}

#[test]
fn sizes_are_limited_by_name() {
    let limits = Limits {
        sqlite_rows_max: 3,
        sqlite_value_bytes_max: 100_000,
        sqlite_database_bytes_max: 1 << 20,
        payload_bytes_max: 50_000,
        ..Limits::default()
    };
    let mut database = Database::open(&snapshot("CREATE TABLE t (a)").1, &limits, Seed::new(1), 0).unwrap();
    let numbers = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 4)";
    let reached = |name, value| SqliteError::LimitReached { name, value };
    assert_eq!(database.query(&format!("{numbers} SELECT n FROM c"), &[], 0), Err(reached("sqlite_rows_max", 3)));
    assert_eq!(database.query("SELECT zeroblob(60000)", &[], 0), Err(reached("payload_bytes_max", 50_000)));
    assert_eq!(database.query("SELECT zeroblob(200000)", &[], 0), Err(reached("sqlite_value_bytes_max", 100_000)));
    for table in ["t", "temp.u"] {
        database.execute("CREATE TEMP TABLE IF NOT EXISTS u (a)", &[], 0).unwrap();
        let fill = format!(
            "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 40) INSERT INTO {table} SELECT zeroblob(90000) FROM c"
        );
        assert_eq!(database.execute(&fill, &[], 0), Err(reached("sqlite_database_bytes_max", 1 << 20)), "{table}");
    }
}

#[test]
fn time_is_the_attempts_and_random_follows_from_its_seed() {
    let mut database = empty();
    for (sql, expected) in [
        ("SELECT CURRENT_TIMESTAMP", "2023-11-14 22:13:20"),
        ("SELECT current_date || ' ' || current_time", "2023-11-14 22:13:20"),
        ("SELECT datetime()", "2023-11-14 22:13:20"),
        ("SELECT datetime('NOW', '+1 day')", "2023-11-15 22:13:20"),
        ("SELECT datetime('subsec')", "2023-11-14 22:13:20.123"),
        ("SELECT strftime('%Y')", "2023"),
        ("SELECT strftime('%s', 'now')", "1700000000"),
        ("SELECT date('2024-02-29', '+1 year')", "2025-03-01"),
        ("SELECT timediff('now', '2023-11-13 22:13:20.123')", "+0000-00-01 00:00:00.000"),
    ] {
        assert_eq!(text(&mut database, sql), expected, "{sql}");
    }
    assert_eq!(one(&mut database, "SELECT unixepoch('now')"), Value::Integer(1_700_000_000));
    assert!(
        matches!(one(&mut database, "SELECT julianday()"), Value::Real(day) if (day - 2_460_263.425_9).abs() < 0.001)
    );
    database.execute("CREATE TABLE t (a, at DEFAULT CURRENT_TIMESTAMP)", &[], NOW_NS).unwrap();
    database.execute("INSERT INTO t (a) VALUES (1)", &[], NOW_NS + 1_000_000_000).unwrap();
    assert_eq!(text(&mut database, "SELECT at FROM t"), "2023-11-14 22:13:21");
    for sql in ["SELECT datetime('now', 'localtime')", "SELECT strftime('%H', '2024-01-01', 'UTC')"] {
        assert!(
            matches!(database.query(sql, &[], 0), Err(SqliteError::Sql(text)) if text.contains("depend on the machine"))
        );
    }
    let draw = |seed| {
        let mut database = Database::open(&snapshot("").1, &Limits::default(), Seed::new(seed), 0).unwrap();
        let row = database.query("SELECT random(), random(), randomblob(9), hex(randomblob(4))", &[], 0).unwrap();
        row.rows
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    assert_ne!(draw(1)[0][0], draw(1)[0][1]);
    assert!(matches!(&draw(1)[0][2], Value::Blob(bytes) if bytes.len() == 9));
}

#[test]
fn mistakes_are_sqlites_own_words() {
    let mut database = empty();
    for (sql, expected) in [
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM nowhere", "no such table"),
        ("", "no statement"),
        ("SELECT 1; SELECT 2", "more than one"),
        ("SELECT ?", "1 parameters and 0 values"),
    ] {
        match database.query(sql, &[], 0) {
            Err(SqliteError::Sql(text)) => assert!(text.contains(expected), "{sql}: {text}"),
            other => panic!("{sql}: {other:?}"),
        }
    }
}

#[test]
fn files_that_are_no_snapshot_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let load = || Snapshot::load(&path, &Limits::default());
    assert!(matches!(load(), Err(SnapshotError::Read { .. })));
    std::fs::write(&path, "no database").unwrap();
    assert!(matches!(load(), Err(SnapshotError::NotADatabase { .. })));
    std::fs::write(&path, [MAGIC, &[0xff; 2_000]].concat()).unwrap();
    assert!(matches!(load(), Err(SnapshotError::Damaged { .. })));
    std::fs::write(&path, "").unwrap();
    load().unwrap();
    let small = Limits { sqlite_database_bytes_max: 100, ..Limits::default() };
    std::fs::write(&path, [MAGIC, &[0; 2_000]].concat()).unwrap();
    assert!(matches!(Snapshot::load(&path, &small), Err(SnapshotError::TooLarge { value: 100, .. })));
}

#[test]
fn a_write_ahead_log_must_be_joined_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let connection = Connection::open(&path).unwrap();
    connection.pragma_update(None, "journal_mode", "WAL").unwrap();
    connection.execute_batch("CREATE TABLE t (a); INSERT INTO t VALUES (1)").unwrap();
    assert!(matches!(Snapshot::load(&path, &Limits::default()), Err(SnapshotError::WriteAheadLog { .. })));
    // The last connection to close joins them.
    drop(connection);
    let snapshot = Snapshot::load(&path, &Limits::default()).unwrap();
    assert_eq!(one(&mut open(&snapshot), "SELECT a FROM t"), Value::Integer(1));
}
