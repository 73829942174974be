"""HTTP/1.1 as a client that sends any bytes and looks closely at what comes back."""
import socket
import time


class Response:
    """What came: head, body, how it ended (`whole`, `cut`, `reset`, `nothing`), and whether the connection stayed."""

    def __init__(self):
        self.interim, self.status, self.headers, self.body, self.ended, self.connection = [], None, [], b"", "nothing", "open"

    def get(self, name):
        return next((value for key, value in self.headers if key == name), None)


class Reader:
    """Bytes from a socket; remembers how they ended."""

    def __init__(self, connection):
        self.connection, self.buffer, self.end = connection, b"", None

    def more(self):
        if self.end is None:
            try:
                data = self.connection.recv(65536)
                self.buffer += data
                if not data:
                    self.end = "cut"
            except (ConnectionResetError, BrokenPipeError):
                self.end = "reset"
            except TimeoutError:
                self.end = "timeout"
        return self.end is None

    def until(self, mark):
        while mark not in self.buffer:
            if not self.more():
                return None
        text, _, self.buffer = self.buffer.partition(mark)
        return text

    def exactly(self, count):
        while len(self.buffer) < count and self.more():
            pass
        text, self.buffer = self.buffer[:count], self.buffer[count:]
        return text


def connect(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def exchange(port, *parts, count=1, pause_s=0.05, half_close=False):
    """Sends the parts with a pause between them and reads `count` responses. A list if count is not 1."""
    with connect(port) as connection:
        reader = Reader(connection)
        for number, part in enumerate(parts):
            if number:
                time.sleep(pause_s)
            try:
                connection.sendall(part)
            except (ConnectionResetError, BrokenPipeError):
                break
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        heads = [part.split(b" ", 1)[0] for part in parts]
        responses = [read(reader, heads[0] == b"HEAD") for _ in range(count)]
        last = responses[-1]
        if reader.end is None:
            connection.settimeout(0.06)
            reader.more()
        last.connection = "open" if reader.end in (None, "timeout") else "closed"
        if reader.buffer:
            last.body += b" [and then] " + reader.buffer
    return responses if count != 1 else last


def read(reader, head_only=False):
    response = Response()
    while True:
        head = reader.until(b"\r\n\r\n")
        if head is None:
            response.ended = "nothing" if reader.end == "cut" and not reader.buffer else reader.end
            response.body, reader.buffer = reader.buffer, b""
            return response
        line, *fields = head.decode("latin-1").split("\r\n")
        status = int(line.split(" ")[1])
        if status >= 200 or status == 101:
            break
        response.interim.append(status)
    response.status = status
    response.headers = [(name.lower(), value.strip()) for name, _, value in (field.partition(":") for field in fields)]
    response.ended = "whole"
    if head_only or status in (101, 204, 304):
        return response
    if (response.get("transfer-encoding") or "").lower() == "chunked":
        read_chunks(reader, response)
    elif response.get("content-length") is not None:
        wanted = int(response.get("content-length"))
        response.body = reader.exactly(wanted)
        if len(response.body) < wanted:
            response.ended = reader.end
    else:
        while reader.more():
            pass
        response.body, reader.buffer = reader.buffer, b""
        response.ended = "whole" if reader.end == "cut" else reader.end
    return response


def read_chunks(reader, response):
    while True:
        line = reader.until(b"\r\n")
        if line is None:
            response.ended = reader.end
            return
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        data = reader.exactly(size)
        response.body += data
        if len(data) < size or reader.until(b"\r\n") is None:
            response.ended = reader.end
            return
    while (field := reader.until(b"\r\n")):
        name, _, value = field.decode("latin-1").partition(":")
        response.headers.append(("trailer " + name.lower(), value.strip()))
    if field is None:
        response.ended = reader.end
