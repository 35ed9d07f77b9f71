use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

const SECRET: &str = "s3cr3t-api-key-value";

/// A server on this machine that gives every connection the same bytes and keeps what it was sent.
struct Stub {
    port: u16,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Stub {
    fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::new(move |stream, _| stream.write_all(&answer))
    }

    /// Sends back the head of the request as its body.
    fn echo() -> Self {
        Self::new(|stream, heard| {
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nx-echo: {SECRET}!\r\n\r\n{heard}", heard.len())
        })
    }

    fn new(serve: impl Fn(&mut dyn Write, &str) -> std::io::Result<()> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = Arc::new(Mutex::new(vec![]));
        let keep = Arc::clone(&heard);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let head = read_request(&mut stream);
                keep.lock().unwrap().push(head.clone());
                let _ = serve(&mut stream, &head);
            }
        });
        Self { port, heard }
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }
}

fn read_request(stream: &mut impl Read) -> String {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    head + &String::from_utf8(body).unwrap()
}

fn grant(origin: &str, allow_private: &[&str]) -> HttpGrant {
    HttpGrant {
        origin: origin.parse().unwrap(),
        headers: [("authorization".to_owned(), serde_json::from_str(r#"{"env":"KEY","prefix":"Bearer "}"#).unwrap())]
            .into(),
        allow_private: allow_private.iter().map(|range| range.parse().unwrap()).collect(),
        certificate_authority: None,
    }
}

fn client(grants: &[HttpGrant]) -> HttpClient {
    HttpClient::new("tools.rooms", grants, &|name| (name == "KEY").then(|| SECRET.to_owned())).unwrap()
}

fn get(url: impl Into<String>) -> HttpRequest {
    HttpRequest { method: "GET".to_owned(), url: url.into(), headers: vec![], body: vec![], timeout_ms: None }
}

async fn ask(client: &HttpClient, request: HttpRequest) -> Result<HttpResponse, HttpError> {
    client.send(request, &Limits::default()).await
}

/// Answers with one list of addresses after the other, and counts.
struct Names(Vec<Vec<IpAddr>>, AtomicUsize);

impl Resolve for Names {
    fn resolve(&self, _host: String) -> BoxFuture<'_, std::io::Result<Vec<IpAddr>>> {
        let turn = self.1.fetch_add(1, Ordering::Relaxed);
        Box::pin(std::future::ready(Ok(self.0[turn.min(self.0.len() - 1)].clone())))
    }
}

fn names(lists: &[&[&str]]) -> Arc<Names> {
    let lists = lists.iter().map(|list| list.iter().map(|address| address.parse().unwrap()).collect());
    Arc::new(Names(lists.collect(), AtomicUsize::new(0)))
}

#[tokio::test]
async fn the_host_adds_the_secret_and_the_plugin_never_sees_it() {
    let stub = Stub::echo();
    let origin = format!("http://127.0.0.1:{}", stub.port);
    let client = client(&[grant(&origin, &["127.0.0.1"])]);
    let request = HttpRequest {
        method: "POST".to_owned(),
        headers: vec![("X-Own".to_owned(), "1".to_owned())],
        body: b"hello".to_vec(),
        ..get(format!("{origin}/a/b?c=d#e"))
    };
    let response = ask(&client, request).await.unwrap();
    let heard = stub.heard().remove(0);
    for text in [
        "POST /a/b?c=d HTTP/1.1".to_owned(),
        format!("host: 127.0.0.1:{}", stub.port),
        format!("authorization: Bearer {SECRET}"),
        "x-own: 1".to_owned(),
        "hello".to_owned(),
    ] {
        assert!(heard.contains(&text), "no {text:?} in {heard}");
    }
    assert_eq!(response.status, 200);
    let seen = serde_json::to_string(&response).unwrap() + &String::from_utf8_lossy(&response.body);
    assert!(!seen.contains(SECRET), "{seen}");
    assert!(String::from_utf8(response.body).unwrap().contains("authorization: Bearer [redacted]"));
    assert!(response.headers.contains(&("x-echo".to_owned(), "[redacted]!".to_owned())));
    assert!(!format!("{client:?}").contains(SECRET));
}

#[tokio::test]
async fn what_is_not_granted_is_denied_with_the_line_that_would_allow_it() {
    let stub = Stub::echo();
    let origin = format!("http://127.0.0.1:{}", stub.port);
    let client = client(&[grant(&origin, &[])]);
    for (url, expected) in [
        (format!("https://127.0.0.1:{}", stub.port), format!("origin = \"https://127.0.0.1:{}\"", stub.port)),
        ("http://127.0.0.1:1".to_owned(), "origin = \"http://127.0.0.1:1\"".to_owned()),
        (format!("http://localhost:{}", stub.port), "localhost".to_owned()),
        (origin.clone(), "loopback".to_owned()),
        (origin.clone(), "allow_private = [\"127.0.0.1\"]".to_owned()),
    ] {
        match ask(&client, get(url.clone())).await {
            Err(HttpError::Denied(text)) => {
                assert!(text.contains(&expected) && text.contains("[tools.rooms.grants]"), "{url}: {text}");
            }
            other => panic!("{url}: {other:?}"),
        }
    }
    assert!(stub.heard().is_empty());
}

#[tokio::test]
async fn a_name_is_looked_up_once_and_the_checked_address_is_connected_to() {
    let stub = Stub::echo();
    let origin = format!("http://rebind.example:{}", stub.port);
    // Public at first and loopback afterwards would be the trick; here the first answer decides and nobody asks again.
    let resolver = names(&[&["127.0.0.1"], &["127.0.0.2"]]);
    let named = client(&[grant(&origin, &["127.0.0.1"])]).with_resolver(Arc::clone(&resolver) as Arc<dyn Resolve>);
    assert_eq!(ask(&named, get(origin.clone())).await.unwrap().status, 200);
    assert_eq!(resolver.1.load(Ordering::Relaxed), 1);
    assert!(stub.heard()[0].contains(&format!("host: rebind.example:{}", stub.port)));
    assert!(matches!(ask(&named, get(origin.clone())).await, Err(HttpError::Denied(_))), "127.0.0.2 is not named");
    for addresses in
        [&["127.0.0.1"][..], &["93.184.216.34", "10.0.0.1"], &["::ffff:127.0.0.1"], &["169.254.169.254"], &["fd00::1"]]
    {
        let open = client(&[grant(&origin, &[])]).with_resolver(names(&[addresses]));
        assert!(matches!(ask(&open, get(origin.clone())).await, Err(HttpError::Denied(_))), "{addresses:?}");
    }
    let nowhere = client(&[grant(&origin, &[])]).with_resolver(names(&[&[]]));
    assert!(matches!(ask(&nowhere, get(origin)).await, Err(HttpError::Unreachable(_))));
    assert_eq!(stub.heard().len(), 1);
}

#[tokio::test]
async fn redirects_are_answers() {
    let stub = Stub::answering("HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n");
    let origin = format!("http://127.0.0.1:{}", stub.port);
    let response = ask(&client(&[grant(&origin, &["127.0.0.0/8"])]), get(origin)).await.unwrap();
    assert_eq!(response.status, 302);
    assert!(response.headers.contains(&("location".to_owned(), "http://169.254.169.254/".to_owned())));
    assert_eq!(stub.heard().len(), 1);
}

#[tokio::test]
async fn requests_cannot_be_bent() {
    let stub = Stub::echo();
    let origin = format!("http://127.0.0.1:{}", stub.port);
    let client = client(&[grant(&origin, &["127.0.0.1"])]);
    let with_header = |name: &str, value: &str| HttpRequest {
        headers: vec![(name.to_owned(), value.to_owned())],
        ..get(origin.clone())
    };
    let bad = [
        with_header("host", "other.example"),
        with_header("Authorization", "Bearer mine"),
        with_header("Transfer-Encoding", "chunked"),
        with_header("content-length", "3"),
        with_header("accept-encoding", "gzip"),
        with_header("x", "1\r\nhost: other.example"),
        with_header("x y", "1"),
        HttpRequest { method: "CONNECT".to_owned(), ..get(origin.clone()) },
        HttpRequest { method: "GET / HTTP/1.1\r\n".to_owned(), ..get(origin.clone()) },
        get(format!("{origin}/a b")),
        get(format!("{origin}/a\r\nhost: b")),
        get(format!("http://u@127.0.0.1:{}/", stub.port)),
        get("file:///etc/passwd"),
        get(""),
    ];
    for request in bad {
        let answer = ask(&client, request.clone()).await;
        assert!(matches!(answer, Err(HttpError::InvalidRequest(_))), "{request:?}: {answer:?}");
    }
    assert!(stub.heard().is_empty());
}

#[tokio::test]
async fn time_and_size_are_limited_by_name() {
    // Accepts connections by its backlog and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let origin = format!("http://127.0.0.1:{}", silent.local_addr().unwrap().port());
    let one = client(&[grant(&origin, &["127.0.0.1"])]);
    let short = HttpRequest { timeout_ms: Some(20), ..get(origin.clone()) };
    assert_eq!(ask(&one, short).await, Err(HttpError::Timeout { timeout_ms: 20 }));
    let limits = Limits { http_timeout_ms_max: 30, http_request_bytes_max: 10, ..Limits::default() };
    let long = HttpRequest { timeout_ms: Some(1_000_000), ..get(origin.clone()) };
    assert_eq!(one.send(long, &limits).await, Err(HttpError::Timeout { timeout_ms: 30 }));
    let large = HttpRequest { body: vec![0; 11], ..get(origin) };
    assert_eq!(one.send(large, &limits).await, Err(limit("http_request_bytes_max", 10)));

    let endless = Stub::new(|stream, _| {
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
        loop {
            stream.write_all(&[b'x'; 4_096])?;
        }
    });
    let origin = format!("http://127.0.0.1:{}", endless.port);
    let one = client(&[grant(&origin, &["127.0.0.1"])]);
    assert_eq!(ask(&one, get(origin)).await, Err(limit("http_response_bytes_max", 1 << 20)));
}

#[tokio::test]
async fn what_is_not_plain_http_fails() {
    for answer in [
        "SSH-2.0-x\r\n",
        "",
        "HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx",
        "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx",
    ] {
        let stub = Stub::answering(answer);
        let origin = format!("http://127.0.0.1:{}", stub.port);
        let got = ask(&client(&[grant(&origin, &["127.0.0.1"])]), get(origin)).await;
        assert!(matches!(got, Err(HttpError::Failed(_))), "{answer:?}: {got:?}");
    }
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let origin = format!("http://127.0.0.1:{}", free.local_addr().unwrap().port());
    drop(free);
    let got = ask(&client(&[grant(&origin, &["127.0.0.1"])]), get(origin)).await;
    assert!(matches!(got, Err(HttpError::Unreachable(_))), "{got:?}");
}

/// A server with a certificate for `api.example` of an authority of its own; returns its port and the authority's file.
fn tls_server(folder: &std::path::Path) -> (u16, PathBuf) {
    let issued = rcgen::generate_simple_self_signed(["api.example".to_owned()]).unwrap();
    let authority = folder.join("authority.pem");
    std::fs::write(&authority, issued.cert.pem()).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(issued.signing_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![issued.cert.der().clone()], key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, stream.unwrap());
            let _ = read_request(&mut stream);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    (port, authority)
}

#[tokio::test]
async fn certificates_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let (port, authority) = tls_server(folder.path());
    let origin = format!("https://api.example:{port}");
    let known = HttpGrant { certificate_authority: Some(authority.clone()), ..grant(&origin, &["127.0.0.1"]) };
    let local = || names(&[&["127.0.0.1"]]);
    let trusted = client(std::slice::from_ref(&known)).with_resolver(local());
    assert_eq!(ask(&trusted, get(origin.clone())).await.unwrap().body, b"ok");
    let public_only = client(&[grant(&origin, &["127.0.0.1"])]).with_resolver(local());
    let other = format!("https://other.example:{port}");
    let other_name = client(&[HttpGrant { origin: other.parse().unwrap(), ..known.clone() }]).with_resolver(local());
    for (client, url) in [(public_only, origin), (other_name, other)] {
        match ask(&client, get(url)).await {
            Err(HttpError::Failed(text)) => assert!(text.contains("no TLS"), "{text}"),
            other => panic!("{other:?}"),
        }
    }
    std::fs::write(&authority, "no certificate").unwrap();
    let made = HttpClient::new("tools.x", &[known], &|_| Some(SECRET.to_owned()));
    assert!(matches!(made, Err(HttpSetupError::CertificateAuthority { .. })));
}

#[test]
fn a_client_without_its_secrets_is_not_made() {
    let made =
        |grants: &[HttpGrant]| HttpClient::new("tools.x", grants, &|_| None).map(|_| ()).unwrap_err().to_string();
    assert!(made(&[grant("http://a", &[])]).contains("KEY"));
    let mut host = grant("http://a", &[]);
    let source = host.headers.remove("authorization").unwrap();
    host.headers.insert("host".to_owned(), source);
    assert!(made(&[host]).contains("`host`"));
    let bare = HttpGrant { headers: [].into(), ..grant("http://a", &[]) };
    assert!(made(&[bare.clone(), bare]).contains("twice"));
}
