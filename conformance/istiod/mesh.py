"""What istiod is configured with, and the bootstrap of a sidecar."""
import copy
import json

NAMESPACE = "demo"
TYPE = "type.googleapis.com/"
# Each has an address of its own: istiod tells workloads apart by it.
CLIENT, SERVER, REDIRECTED = "127.0.0.3", "127.0.0.2", "127.0.0.4"
ISTIO_VERSION = "1.31.0"
ISTIOD = "v0.0.0-20260827124520-eed52ebb66ad"
IDENTITY = f"spiffe://cluster.local/ns/{NAMESPACE}/sa/"

SECRETS = "var/run/secrets/workload-spiffe-uds/test.sock"  # as in pilot-agent's bootstrap
# Parts of that bootstrap that are refused by name, and taken out: none of them changes what happens to a request here.
LEFT_OUT = ("application_log_config", "overload_manager")
COMPRESSOR = TYPE + "envoy.extensions.filters.http.compressor.v3.Compressor"


def whose(name):
    """How a workload says to istiod who it is."""
    return f"URI={IDENTITY}{name}"


def mesh_config(ports):
    """Access logs go nowhere: what is looked at are the answers."""
    return {"accessLogFile": "/dev/null", "trustDomain": "cluster.local", "enableAutoMtls": True,
            "proxyListenPort": ports["capture_out"], "proxyInboundListenPort": ports["capture_in"],
            "defaultConfig": {"discoveryAddress": f"127.0.0.1:{ports['xds']}"}}


def resource(api, kind, name, spec):
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}


def networking(kind, name, spec):
    return resource("networking.istio.io/v1", kind, name, spec)


def services(ports):
    """`echo` stands behind a sidecar and speaks HTTP and TCP; the others are there to be configured."""
    entry = {"hosts": ["echo.demo.svc.cluster.local"], "addresses": ["240.0.0.1"], "location": "MESH_INTERNAL", "resolution": "STATIC",
             "ports": [{"number": ports["out_http"], "name": "http", "protocol": "HTTP", "targetPort": ports["in_http"]},
                       {"number": ports["out_tcp"], "name": "tcp", "protocol": "TCP", "targetPort": ports["in_tcp"]}],
             "workloadSelector": {"labels": {"app": "echo"}}}
    outside = {"hosts": ["api.outside.test"], "location": "MESH_EXTERNAL", "resolution": "DNS",
               "ports": [{"number": ports["outside_http"], "name": "http", "protocol": "HTTP"},
                         {"number": ports["outside_tls"], "name": "tls", "protocol": "TLS"}]}
    several = {"hosts": ["several.demo.svc.cluster.local"], "addresses": ["240.0.0.2"], "location": "MESH_INTERNAL", "resolution": "STATIC",
               "ports": [{"number": ports["several_http"], "name": "http", "protocol": "HTTP"},
                         {"number": ports["several_grpc"], "name": "grpc", "protocol": "GRPC"},
                         {"number": ports["several_any"], "name": "unknown"}],
               "endpoints": [{"address": f"127.0.1.{part}", "labels": {"version": f"v{part}"}, "locality": f"here/zone{part}",
                              "weight": part} for part in (1, 2)]}
    return [networking("ServiceEntry", "echo", entry), networking("ServiceEntry", "outside", outside),
            networking("ServiceEntry", "several", several)]


def workload(name, address):
    """With the label that says that it can speak Istio's mTLS."""
    labels = {"app": name, "version": "v1", "security.istio.io/tlsMode": "istio"}
    return networking("WorkloadEntry", name, {"address": address, "labels": labels, "serviceAccount": name})


def traffic():
    """Routing, subsets, retries and limits as meshes have them."""
    routes = [
        {"match": [{"uri": {"prefix": "/echo/"}, "headers": {"x-version": {"exact": "2"}}}],
         "rewrite": {"uri": "/two/"}, "route": [{"destination": {"host": "echo.demo.svc.cluster.local", "subset": "v1"}}]},
        {"match": [{"uri": {"prefix": "/"}}],
         "retries": {"attempts": 2, "perTryTimeout": "2s", "retryOn": "connect-failure,refused-stream,503"},
         "headers": {"request": {"add": {"x-by-istiod": "yes"}}},
         "route": [{"destination": {"host": "echo.demo.svc.cluster.local"}}]}]
    split = [{"fault": {"abort": {"percentage": {"value": 0.1}, "httpStatus": 503}},
              "corsPolicy": {"allowOrigins": [{"exact": "https://here.test"}], "allowMethods": ["GET"]},
              "mirror": {"host": "several.demo.svc.cluster.local", "subset": "v2"},
              "route": [{"weight": 90, "destination": {"host": "several.demo.svc.cluster.local", "subset": "v1"}},
                        {"weight": 10, "destination": {"host": "several.demo.svc.cluster.local", "subset": "v2"}}]}]
    pool = {"tcp": {"maxConnections": 100, "connectTimeout": "1s", "tcpKeepalive": {"time": "60s"}},
            "http": {"http1MaxPendingRequests": 100, "maxRequestsPerConnection": 100, "maxRetries": 3}}
    ejection = {"consecutive5xxErrors": 5, "interval": "10s", "baseEjectionTime": "30s", "maxEjectionPercent": 50}
    return [
        networking("VirtualService", "echo", {"hosts": ["echo.demo.svc.cluster.local"], "http": routes}),
        networking("VirtualService", "several", {"hosts": ["several.demo.svc.cluster.local"], "http": split}),
        networking("DestinationRule", "echo", {
            "host": "echo.demo.svc.cluster.local", "subsets": [{"name": "v1", "labels": {"version": "v1"}}],
            "trafficPolicy": {"connectionPool": pool, "outlierDetection": ejection, "loadBalancer": {"simple": "LEAST_REQUEST"}}}),
        networking("DestinationRule", "several", {
            "host": "several.demo.svc.cluster.local",
            "subsets": [{"name": f"v{part}", "labels": {"version": f"v{part}"}} for part in (1, 2)],
            "trafficPolicy": {"loadBalancer": {"consistentHash": {"httpHeaderName": "x-user"}}}})]


def sidecars(ports):
    """Without interception: a sidecar listens where it is told to. Beside that it listens on all services' ports of 127.0.0.1, of which
    there is one for all of them here: only the client has services to call."""
    inward = [{"port": {"number": ports[f"in_{kind}"], "protocol": kind.upper(), "name": kind}, "bind": SERVER,
               "captureMode": "NONE", "defaultEndpoint": f"127.0.0.1:{ports[f'app_{kind}']}"} for kind in ("http", "tcp")]
    outward = [{"port": {"number": ports[f"out_{kind}"], "protocol": kind.upper(), "name": kind}, "bind": CLIENT,
                "captureMode": "NONE", "hosts": ["./echo.demo.svc.cluster.local"]} for kind in ("http", "tcp")]
    outward.append({"hosts": ["./*"]})
    select = lambda app: {"workloadSelector": {"labels": {"app": app}}}
    return [networking("Sidecar", "echo", {**select("echo"), "ingress": inward, "egress": [{"hosts": ["~/*"]}]}),
            networking("Sidecar", "client", {**select("client"), "egress": outward})]


def peers(mode):
    return resource("security.istio.io/v1", "PeerAuthentication", "default", {"mtls": {"mode": mode}})


def configuration(ports):
    """All that does not change during the stage."""
    workloads = [workload("echo", SERVER), workload("client", CLIENT), workload("redirected", REDIRECTED)]
    return services(ports) + workloads + traffic() + sidecars(ports)


def bootstrap(golden, name, address, mode, ports):
    """pilot-agent's, with places that are free here, and without what is refused. Also what was taken out."""
    made = copy.deepcopy(golden)
    taken = [part for part in LEFT_OUT if made.pop(part, None) is not None]
    # A log of outliers.
    if made.get("cluster_manager", {}).pop("outlier_detection", None) is not None:
        taken.append("cluster_manager.outlier_detection")
    made["node"] = {
        "id": f"sidecar~{address}~{name}.{NAMESPACE}~{NAMESPACE}.svc.cluster.local", "cluster": f"{name}.{NAMESPACE}",
        "metadata": {**golden["node"]["metadata"], "ISTIO_VERSION": ISTIO_VERSION, "NAMESPACE": NAMESPACE, "NAME": name,
                     "WORKLOAD_NAME": name, "SERVICE_ACCOUNT": name, "INSTANCE_IPS": address, "CLUSTER_ID": "Kubernetes",
                     "MESH_ID": "cluster.local", "INTERCEPTION_MODE": mode,
                     "LABELS": {"app": name, "version": "v1", "security.istio.io/tlsMode": "istio"}}}
    server = made["dynamic_resources"]["ads_config"]["grpc_services"][0]
    server["initial_metadata"] = [{"key": "x-forwarded-client-cert", "value": whose(name)}]
    text = json.dumps(made)
    agent, admin, stats, health = (ports[f"{name}_{part}"] for part in ("agent", "admin", "stats", "health"))
    for port, instead in ((15020, agent), (15000, admin), (15090, stats), (15021, health)):
        text = text.replace(f'"port_value": {port}', f'"port_value": {instead}')
    made = json.loads(text.replace('"address": "0.0.0.0"', '"address": "127.0.0.1"'))
    for cluster in made["static_resources"]["clusters"]:
        if cluster["name"] == "xds-grpc":
            endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
            endpoint["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": ports["xds"]}}
    for listener in made["static_resources"]["listeners"]:
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        filters = manager["http_filters"]
        manager["http_filters"] = [one for one in filters if one["typed_config"]["@type"] != COMPRESSOR]
        if len(manager["http_filters"]) < len(filters):
            taken.append(f"the compressors of listener {listener['name']}")
    return made, taken
