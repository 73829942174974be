"""Compares our descriptor set and our tables of fields left out (arguments) with Envoy's descriptors.

The first table holds the numbers of the fields left out; with OUTRIGGER_NUMBERS=write it is written anew. The last line printed
is a JSON object.
"""

import importlib
import json
import os
import re
import sys

from google.protobuf import descriptor_pb2, descriptor_pool

# OTLP is newer here than in the package, which calls scopes by their first name.
OURS_ALONE = ("outrigger/", "google/protobuf/", "opentelemetry/")


def label(field):
    return "map" if is_map(field) else "repeated" if field.is_repeated else "single"


def is_map(field):
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def shape(field):
    """What must be equal for the wire and for JSON."""
    of = field.message_type or field.enum_type
    kind = of.full_name if of and not is_map(field) else field.type
    if is_map(field):
        kind = [shape(entry) for entry in field.message_type.fields]
    choice = field.containing_oneof.name if field.containing_oneof else None
    return [field.name, field.json_name, field.number, label(field), kind, choice]


def left_out(table):
    """Fields by message in the tables of known.rs: ("message", &["field", ...])."""
    fields = {}
    for message, names in re.findall(r'\(\s*"([\w.]+)",\s*&\[([^\]]*)\]', table):
        fields.setdefault(message, []).extend(re.findall(r'"(\w+)"', names))
    return fields


def compare_message(ours, theirs, known, numbers, found, counts):
    counts["messages"] += 1
    listed = known.get(ours.full_name, [])
    missing = {field.name for field in theirs.fields} - {field.name for field in ours.fields}
    if missing:
        fields = sorted((field.number, field.name) for field in theirs.fields if field.name in missing)
        numbers[ours.full_name] = " ".join(f"{number}={name}" for number, name in fields)
    counts["left_out"] += len(missing)
    if sorted(listed) != sorted(missing):
        wrong = sorted(missing ^ set(listed)) or "listed twice"
        found.append(f"{ours.full_name}: known.rs and the fields left out differ: {wrong}")
    for field in ours.fields:
        counts["fields"] += 1
        other = theirs.fields_by_name.get(field.name)
        if other is None:
            found.append(f"{ours.full_name}.{field.name}: Envoy has no such field")
        elif shape(field) != shape(other):
            found.append(f"{ours.full_name}.{field.name}: {shape(field)} is {shape(other)} in Envoy")
    for nested in ours.nested_types:
        if not nested.GetOptions().map_entry:
            other = theirs.nested_types_by_name.get(nested.name)
            if other is None:
                found.append(f"{nested.full_name}: Envoy has no such message")
            else:
                compare_message(nested, other, known, numbers, found, counts)
    for nested in ours.enum_types:
        compare_enum(nested, theirs.enum_types_by_name.get(nested.name), found, counts)


def compare_enum(ours, theirs, found, counts):
    counts["enums"] += 1
    values = lambda enum: {value.name: value.number for value in enum.values} if enum else None
    if values(ours) != values(theirs):
        found.append(f"{ours.full_name}: {values(ours)} is {values(theirs)} in Envoy")


def compare_numbers(path, numbers, found):
    """Fields left out by their numbers, which is how a control plane names them."""
    table = "".join(f"{message} {fields}\n" for message, fields in sorted(numbers.items()))
    if os.environ.get("OUTRIGGER_NUMBERS") == "write":
        with open(path, "w", encoding="utf-8") as file:
            file.write(table)
    with open(path, encoding="utf-8") as file:
        if file.read() != table:
            found.append(f"{path} is stale; OUTRIGGER_NUMBERS=write makes it anew")


def main():
    files = descriptor_pb2.FileDescriptorSet()
    with open(sys.argv[1], "rb") as descriptors:
        files.ParseFromString(descriptors.read())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    known = {}
    for path in sys.argv[3:]:
        with open(path, encoding="utf-8") as table:
            known.update(left_out(table.read()))
    numbers = {}
    found, counts = [], {"files": 0, "messages": 0, "fields": 0, "left_out": 0, "enums": 0}
    for file in files.file:
        if file.name.startswith(OURS_ALONE):
            continue
        counts["files"] += 1
        ours = pool.FindFileByName(file.name)
        module = importlib.import_module(file.name[: -len(".proto")].replace("/", ".") + "_pb2")
        theirs = module.DESCRIPTOR
        if ours.package != theirs.package:
            found.append(f"{file.name}: package {ours.package} is {theirs.package} in Envoy")
        for name, message in ours.message_types_by_name.items():
            other = theirs.message_types_by_name.get(name)
            if other is None:
                found.append(f"{message.full_name}: Envoy has no such message in this file")
            else:
                compare_message(message, other, known, numbers, found, counts)
        for name, enum in ours.enum_types_by_name.items():
            compare_enum(enum, theirs.enum_types_by_name.get(name), found, counts)
    compare_numbers(sys.argv[2], numbers, found)
    for problem in found:
        print(problem)
    good = not found and counts["fields"] > 0
    print(json.dumps({"stage": "xds-descriptors", "ok": good, **counts, "differences": len(found)}))
    sys.exit(0 if good else 1)


main()
