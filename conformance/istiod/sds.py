"""What pilot-agent does beside a sidecar: secrets of one workload, by Envoy's secret discovery service on a socket."""
import concurrent.futures

import grpc

TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
SERVICE = "envoy.service.secret.v3.SecretDiscoveryService"
STREAMS_MAX = 16  # each has a thread


def varint(number):
    out = bytearray()
    while number > 0x7f:
        out.append(number & 0x7f | 0x80)
        number >>= 7
    return bytes(out + bytes([number]))


def field(number, content):
    """One with a length: a text, bytes or a message."""
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def read_varint(message, at):
    number = shift = 0
    while True:
        number, shift, at = number | (message[at] & 0x7f) << shift, shift + 7, at + 1
        if message[at - 1] < 0x80:
            return number, at


def fields(message):
    """Number and content of each field; numbers have none."""
    at = 0
    while at < len(message):
        key, at = read_varint(message, at)
        length, at = read_varint(message, at)
        if key & 7 == 0:
            continue
        assert key & 7 == 2, f"field {key >> 3} has a wire type that is not expected"
        yield key >> 3, message[at:at + length]
        at += length


def inline(text):
    """A DataSource with an inline_string."""
    return field(3, text)


def secrets(chain, key, root):
    """As istiod names them."""
    identity = field(1, inline(chain)) + field(2, inline(key))
    return {"default": field(1, "default") + field(2, identity), "ROOTCA": field(1, "ROOTCA") + field(4, field(1, inline(root)))}


def serve(path, known):
    """A server on that socket; each name is answered once on each stream, and what acknowledges is not."""

    def stream(requests, _context):
        told = set()
        for request in requests:
            names = [content.decode() for number, content in fields(request) if number == 3]
            for name in names:
                if name in known and name not in told:
                    told.add(name)
                    resource = field(1, TYPE) + field(2, known[name])
                    yield field(1, "1") + field(2, resource) + field(4, TYPE) + field(5, name)

    handler = grpc.stream_stream_rpc_method_handler(stream)
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(STREAMS_MAX))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"StreamSecrets": handler})])
    server.add_insecure_port(f"unix:{path}")
    server.start()
    return server
