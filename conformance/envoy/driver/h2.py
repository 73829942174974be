"""HTTP/2 as a client that sends any header: just enough frames, and HPACK without compression.

Of a response only what needs no decoder of Huffman's code is read: the status, the data, how it ended.
"""
import struct

import wire

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS, ACK, PADDED, PRIORITY = 1, 4, 1, 8, 32
STATUS = {0x88: "200", 0x89: "204", 0x8a: "206", 0x8b: "304", 0x8c: "400", 0x8d: "404", 0x8e: "500"}
DIGITS = {0b00000: "0", 0b00001: "1", 0b00010: "2"} | {0b011001 + n: str(n + 3) for n in range(7)}


class Answer:
    """Plain values, to be compared."""

    def __init__(self):
        self.status, self.body, self.ended = None, b"", "nothing"

    def plain(self):
        return {"status": self.status, "body": self.body.decode("latin-1"), "ended": self.ended}


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def text(value):
    value = value if isinstance(value, bytes) else value.encode("latin-1")
    length = bytes([len(value)]) if len(value) < 127 else bytes([127, (len(value) - 127) & 127 | 128, (len(value) - 127) >> 7])
    return length + value


def block(fields):
    return b"".join(b"\0" + text(name) + text(value) for name, value in fields)


def status_of(payload):
    """`:status` comes first; indexed, or with a value of three digits."""
    while payload and payload[0] & 0xe0 == 0x20:  # a table size update
        payload = payload[1:]
    if payload[0] in STATUS:
        return STATUS[payload[0]]
    value = payload[2:2 + (payload[1] & 127)]
    if not payload[1] & 128:
        return value.decode()
    bits, digits = "".join(f"{byte:08b}" for byte in value), ""
    while len(digits) < 3:
        for length in (5, 6):
            code = bits[:length]
            if int(code, 2) in DIGITS and (length == 5) == (int(code, 2) < 3 and code[:3] == "000"):
                digits, bits = digits + DIGITS[int(code, 2)], bits[length:]
                break
        else:
            return f"not digits: {value!r}"
    return digits


def exchange(port, fields, body=b"", trailers=None):
    """One request on stream 1 of a connection of its own, and what became of it."""
    answer = Answer()
    last = not body and trailers is None
    sent = PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS | (END_STREAM if last else 0), 1, block(fields))
    if body:
        sent += frame(DATA, 0 if trailers else END_STREAM, 1, body)
    if trailers is not None:
        sent += frame(HEADERS, END_HEADERS | END_STREAM, 1, block(trailers))
    with wire.connect(port) as connection:
        reader = wire.Reader(connection)
        connection.sendall(sent)
        while answer.ended == "nothing":
            head = reader.exactly(9)
            if len(head) < 9:
                answer.ended = f"connection {reader.end}"
                break
            length, (kind, flags) = int.from_bytes(head[:3], "big"), head[3:5]
            stream = int.from_bytes(head[5:9], "big") & 0x7fffffff
            payload = reader.exactly(length)
            read_frame(answer, kind, flags, stream, payload)
            if kind == SETTINGS and not flags & ACK:
                connection.sendall(frame(SETTINGS, ACK, 0))
    return answer.plain()


def read_frame(answer, kind, flags, stream, payload):
    if kind == HEADERS and stream == 1 and answer.status is None:
        answer.status = status_of(payload)
    if kind == DATA and stream == 1:
        answer.body += payload
    if kind == RST_STREAM and stream == 1:
        answer.ended = f"reset {int.from_bytes(payload, 'big')}"
    elif kind == GOAWAY:
        answer.ended = f"connection refused with {int.from_bytes(payload[4:8], 'big')}"
    elif kind in (HEADERS, DATA) and stream == 1 and flags & END_STREAM:
        answer.ended = "whole"
