"""What passes between a proxy and its engine, and when? A TCP relay that notes the requests for a generation.

Changes nothing; may hold back what goes to the engine.
"""
import socket
import threading
import time

from processes import free_ports

TCP_CLOSE, TCP_CLOSE_WAIT = 7, 8  # of the kernel's TCP_INFO


class Leg:
    """One request for a generation, as it passed; times are monotonic seconds."""

    def __init__(self, head):
        self.line, self.begun, self.answered, self.closed = head.split(b"\r\n", 1)[0].decode(), time.monotonic(), None, None


class Relay:
    """Stands where an engine is expected. While `gate` is shut, requests for a generation wait here; what polls the engine passes."""

    def __init__(self, target, options=""):
        self.target, self.options, self.legs = target, options, []
        self.gate = threading.Event()
        self.gate.set()
        port = free_ports()
        self.address = f"127.0.0.1:{port}"
        self.listener = socket.create_server(("127.0.0.1", port), backlog=128)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.carry, args=(near,), daemon=True).start()

    def carry(self, near):
        host, port = self.target.address.rsplit(":", 1)
        try:
            far = socket.create_connection((host, int(port)))
        except OSError:
            near.close()
            return
        legs = []
        back = threading.Thread(target=self.bring_back, args=(near, far, legs), daemon=True)
        back.start()
        try:
            while piece := near.recv(65536):
                if piece.startswith(b"POST /v1/"):
                    legs.append(Leg(piece))
                    self.legs.append(legs[-1])
                    while not self.gate.wait(0.01):
                        if is_left(near):
                            raise ConnectionResetError
                far.sendall(piece)
        except OSError:
            pass
        if legs and legs[-1].closed is None:
            legs[-1].closed = time.monotonic()
        end(near, far)

    @staticmethod
    def bring_back(near, far, legs):
        try:
            while piece := far.recv(65536):
                if legs and legs[-1].answered is None:
                    legs[-1].answered = time.monotonic()
                near.sendall(piece)
        except OSError:
            pass
        end(near, far)

    def stop(self):
        self.gate.set()
        self.listener.close()


def is_left(one):
    """Whether the other side has closed, even if there is something left to read."""
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in (TCP_CLOSE, TCP_CLOSE_WAIT)


def end(*sockets):
    for one in sockets:
        try:
            one.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
