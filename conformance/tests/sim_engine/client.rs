//! A client that shows what came over the wire: head as it was written, body chunk by chunk.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// How long a test waits for bytes before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A response as it stood on the wire.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status_line: String,
    /// Names as written, in order.
    pub(crate) headers: Vec<(String, String)>,
    /// The body: one element unless it was chunked.
    pub(crate) chunks: Vec<String>,
    /// Whether the body ended as its framing promised.
    pub(crate) complete: bool,
}

impl Answer {
    pub(crate) fn body(&self) -> String {
        self.chunks.concat()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body()).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    /// The JSON of each `data:` event but `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        let data = self.body();
        let data = data
            .split("\n\n")
            .filter_map(|event| event.split_once("data: "))
            .map(|(_, data)| data);
        data.filter(|data| *data != "[DONE]")
            .map(|data| serde_json::from_str(data).expect("event"))
            .collect()
    }
}

/// A connection to an engine.
pub(crate) struct Client {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    pub(crate) fn connect(addr: SocketAddr) -> Self {
        let socket = TcpStream::connect(addr).expect("the engine listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
        Self {
            socket,
            buffer: Vec::new(),
        }
    }

    pub(crate) fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: engine\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() {
            head.push_str(&format!(
                "content-type: application/json\r\ncontent-length: {}\r\n",
                body.len()
            ));
        }
        head.push_str("\r\n");
        self.raw(&[head.as_bytes(), body].concat());
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the engine reads");
    }

    fn fill(&mut self) -> Result<()> {
        let mut bytes = [0; 16 * 1024];
        match self.socket.read(&mut bytes)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            count => {
                self.buffer.extend_from_slice(&bytes[..count]);
                Ok(())
            }
        }
    }

    /// Everything up to and with `end`.
    fn until(&mut self, end: &[u8]) -> Result<Vec<u8>> {
        loop {
            if let Some(at) = self
                .buffer
                .windows(end.len())
                .position(|bytes| bytes == end)
            {
                return Ok(self.buffer.drain(..at + end.len()).collect());
            }
            self.fill()?;
        }
    }

    fn take(&mut self, count: usize) -> Result<Vec<u8>> {
        while self.buffer.len() < count {
            self.fill()?;
        }
        Ok(self.buffer.drain(..count).collect())
    }

    /// Reads the head of a response.
    pub(crate) fn head(&mut self) -> Result<Answer> {
        let head = self.until(b"\r\n\r\n")?;
        let head = String::from_utf8(head).expect("a head is ASCII");
        let mut lines = head.trim_end().split("\r\n");
        let status_line = lines.next().unwrap_or_default().to_owned();
        let header = |line: &str| {
            line.split_once(": ")
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
        };
        Ok(Answer {
            status_line,
            headers: lines.filter_map(header).collect(),
            chunks: Vec::new(),
            complete: false,
        })
    }

    /// Reads one chunk of a chunked body; `None` at its end.
    pub(crate) fn chunk(&mut self) -> Result<Option<String>> {
        let size = String::from_utf8_lossy(&self.until(b"\r\n")?)
            .trim()
            .to_owned();
        let size = usize::from_str_radix(&size, 16)
            .map_err(|_| Error::new(ErrorKind::InvalidData, "no chunk size"))?;
        let chunk = self.take(size + 2)?;
        Ok((size > 0).then(|| String::from_utf8_lossy(&chunk[..size]).into_owned()))
    }

    /// Reads a whole response, or as much of it as comes.
    pub(crate) fn answer(&mut self) -> Result<Answer> {
        let mut answer = self.head()?;
        if let Some(length) = answer.header("content-length") {
            let length = length.parse().expect("a length");
            let body = self.take(length)?;
            answer.chunks.push(String::from_utf8(body).expect("text"));
            answer.complete = true;
        } else {
            loop {
                match self.chunk() {
                    Ok(Some(chunk)) => answer.chunks.push(chunk),
                    Ok(None) => answer.complete = true,
                    Err(_) => {}
                }
                if answer.complete || self.buffer.is_empty() && self.fill().is_err() {
                    break;
                }
            }
        }
        Ok(answer)
    }

    /// What a read at the end of everything says.
    pub(crate) fn end(&mut self) -> Result<usize> {
        self.socket.read(&mut [0; 64])
    }
}

/// One request on a connection of its own.
pub(crate) fn ask(addr: SocketAddr, method: &str, path: &str, body: &[u8]) -> Answer {
    let mut client = Client::connect(addr);
    client.send(method, path, &[], body);
    client
        .answer()
        .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
}

/// A JSON body on a connection of its own.
pub(crate) fn post(addr: SocketAddr, path: &str, body: &Value) -> Answer {
    ask(addr, "POST", path, body.to_string().as_bytes())
}

/// The value of a metric whose line starts with `sample`.
pub(crate) fn metric(addr: SocketAddr, sample: &str) -> f64 {
    let page = ask(addr, "GET", "/metrics", b"").body();
    let line = page.lines().find(|line| line.starts_with(sample));
    let line = line.unwrap_or_else(|| panic!("{sample} is not on the page"));
    line.rsplit(' ')
        .next()
        .and_then(|value| value.parse().ok())
        .expect("a number")
}
