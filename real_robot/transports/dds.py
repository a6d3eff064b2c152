"""ROS 2 without a ROS installation: topics over DDS through cyclonedds (extra ``dds``); tried against rclpy of Jazzy and Kilted.

ROS 2's conventions: topic ``/x`` is ``rt/x``, type ``sensor_msgs::msg::dds_::JointState_``, plain CDR. eProsima's type information
is ignored, since Kilted's does not parse (cyclonedds pull request 2333); key hashes are sent, without which eProsima's DDS does not see
that an endpoint of ours has gone until its lease ends after 10 s; socket buffers are large, or pictures are lost.

Cyclone answers all questions for types that it hears, also what one node of ROS asks another, with those parts that it knows. Nodes of
Kilted (Fast DDS 3.2) that get such a part wait for the rest for ever and, after a few, find nobody any more. So what our types consist of
has names of our own, for which nobody asks: the answer is empty, and nodes go by the topic's type name, as they should.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import threading
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import numpy as np

from real_robot.messages import Message, message_types
from real_robot.transports.base import Endpoint, OnMessage, Quality, Topic, TransportConfig, TransportError
from vla_rl.runtime.errors import UserError

if TYPE_CHECKING:
    from cyclonedds.domain import Domain, DomainParticipant
    from cyclonedds.qos import Qos

BUFFER = "4MB"
EPROSIMA = "1.15"
LARGE = "<MaxMessageSize>65500B</MaxMessageSize><FragmentSize>65000B</FragmentSize>"  # where nothing is lost on the way: a third faster
NACK = "50ms"  # between two questions for what lacks: Fast DDS says so, 128 at a time, which of its endpoints are long gone
BLOCKED_S = 0.1  # that a reliable writer waits for a slow reader at most
TOPIC_PREFIX = "rt"
OUR_NAMES = "vla_rl"  # of what types consist of, see above
DEPTH = {"command": 1, "sensor": 5, "state": 10}


@TransportConfig.register_subclass("dds")
@dataclass(frozen=True)
class DdsConfig(TransportConfig):
    """ROS 2 over DDS.

    domain: ROS_DOMAIN_ID of the robot
    interface: address or name of the network interface; loopback reaches this machine alone
    peers: addresses of other machines, where multicast does not reach them
    """

    domain: int = 0
    interface: str = "127.0.0.1"
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.domain <= 232:
            raise ValueError(f"domain wants 0 to 232, got {self.domain}")

    @property
    def loopback(self) -> bool:
        """Whether only this machine is reached."""
        try:
            return self.interface == "lo" or ipaddress.ip_address(self.interface).is_loopback
        except ValueError:
            return False

    def xml(self) -> str:
        """Cyclone's configuration."""
        key = "address" if self.interface[0].isdigit() or ":" in self.interface else "name"
        multicast = "false" if self.loopback else "default"
        peers = ("127.0.0.1",) if self.loopback else self.peers
        discovery = "".join(f"<Peer Address={quoteattr(p)}/>" for p in peers)
        return (
            '<CycloneDDS><Domain Id="any"><General><Interfaces>'
            f'<NetworkInterface {key}={quoteattr(self.interface)} multicast="{multicast}"/></Interfaces>'
            f"{LARGE if self.loopback else ''}<AllowMulticast>{multicast}</AllowMulticast></General><Discovery>"
            f"<ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>40</MaxAutoParticipantIndex><Peers>{discovery}</Peers></Discovery>"
            f"<Compatibility><IgnoreTypeInformation>{EPROSIMA}</IgnoreTypeInformation></Compatibility>"
            f"<Internal><GenerateKeyhash>true</GenerateKeyhash><AutoReschedNackDelay>{NACK}</AutoReschedNackDelay>"
            f'<SocketReceiveBufferSize min="{BUFFER}"/></Internal></Domain></CycloneDDS>'
        )

    def build(self) -> DdsTransport:
        """See ``TransportConfig``."""
        try:
            import cyclonedds  # noqa: F401
        except ImportError as error:
            raise UserError("transport dds wants the package cyclonedds: pip install 'vla-rl[dds]'") from error
        return DdsTransport(self)


def dds_topic(name: str) -> str:
    """``/joint_states`` as DDS knows it."""
    return TOPIC_PREFIX + name


def dds_type(name: str) -> str:
    """``sensor_msgs/msg/JointState`` as DDS knows it."""
    package, _, kind = name.split("/")
    return f"{package}::msg::dds_::{kind}_"


def ros_type(name: str) -> str:
    """Undo ``dds_type``; what is no ROS type stays as it is."""
    parts = name.split("::")
    return f"{parts[0]}/msg/{parts[3][:-1]}" if len(parts) == 4 and parts[2] == "dds_" else name


@functools.cache
def _struct(name: str, bytes_as_list: bool) -> Any:
    """The IDL class of a message type.

    Cyclone's type object wants ``sequence[uint8]``, a Python list, which takes 50 ms to encode for a picture; a field of ``bytes`` is the
    same on the wire and takes 0.2 ms. So one class describes the topic and its twin, with bytes, is what is encoded.
    """
    from cyclonedds.idl import IdlStruct
    from cyclonedds.idl import types as idl

    sequence: Any = idl.sequence
    kinds = {"bool": bool, "string": str} | {
        name: getattr(idl, name) for name in ("uint8", "int32", "uint32", "float64")
    }
    fields: dict[str, Any] = {}
    for field in message_types()[name]:
        kind = kinds[field.kind] if field.kind in kinds else _struct(field.kind, bytes_as_list)
        as_bytes = field.many and field.kind == "uint8" and not bytes_as_list
        fields[field.name] = bytes if as_bytes else (sequence[kind] if field.many else kind)
    package, _, short = name.split("/")
    body: dict[str, Any] = {"__annotations__": fields, "__module__": __name__}
    made = types.new_class(
        f"{short}_", (IdlStruct,), {"typename": f"{OUR_NAMES}.{package}.{short}"}, lambda space: space.update(body)
    )
    return dataclasses.dataclass(made)


@functools.cache
def _data_type(name: str) -> Any:
    """The class of a topic: described as Cyclone wants it, encoded as its twin."""
    described = _struct(name, True)

    class Sample(described):  # type: ignore[misc]
        """A message on its way; holds a dict instead of fields."""

        def __init__(self, message: Message) -> None:
            self.message = message

        def serialize(self, use_version_2: bool | None = None, **_: Any) -> bytes:
            """CDR of the message."""
            return encode(name, self.message, use_version_2)

        @classmethod
        def deserialize(cls, data: bytes, **_: Any) -> Sample:
            """Undo ``serialize``."""
            return cls(decode(name, data))

    Sample.__idl_typename__ = described.__idl_typename__
    Sample.__idl__ = described.__idl__
    Sample.__idl__.idl_transformed_typename = dds_type(name)
    return Sample


def encode(name: str, message: Mapping[str, Any], use_version_2: bool | None = None) -> bytes:
    """CDR of a message that conforms to its type, with the header of four bytes."""
    twin = _struct(name, False)
    return twin.__idl__.serialize(_filled(name, message), use_version_2=use_version_2)


def decode(name: str, data: bytes) -> Message:
    """Undo ``encode``."""
    return _plain(name, _struct(name, False).__idl__.deserialize(data))


def _filled(name: str, message: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for field in message_types()[name]:
        value = message[field.name]
        if "/" in field.kind:
            value = [_filled(field.kind, v) for v in value] if field.many else _filled(field.kind, value)
        elif isinstance(value, np.ndarray):
            value = value.tolist()
        values[field.name] = value
    return _struct(name, False)(**values)


def _plain(name: str, sample: Any) -> Message:
    message: Message = {}
    for field in message_types()[name]:
        value = getattr(sample, field.name)
        if "/" in field.kind:
            value = [_plain(field.kind, v) for v in value] if field.many else _plain(field.kind, value)
        elif field.many and field.kind in ("float64", "int32", "uint32"):
            value = np.asarray(value, np.float64 if field.kind == "float64" else np.int64)
        message[field.name] = value
    return message


def _qos(quality: Quality, hz: float, writes: bool) -> Qos:
    from cyclonedds.core import Policy, Qos
    from cyclonedds.util import duration

    reliable = Policy.Reliability.Reliable(duration(seconds=BLOCKED_S))
    policies = [
        Policy.Reliability.BestEffort if quality == "sensor" else reliable,
        Policy.Durability.Volatile,
        Policy.History.KeepLast(DEPTH[quality]),
    ]
    if quality == "command" and writes:
        # a deadline is only offered: asked for, it would match no ordinary publisher
        policies += [Policy.Deadline(duration(seconds=2 / hz)), Policy.Lifespan(duration(seconds=2 / hz))]
    return Qos(*policies)


class _Domains:
    """Cyclone configures a domain once per process; it is shared, and goes with the last transport that uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Domain, str, int]] = {}

    def enter(self, config: DdsConfig) -> None:
        from cyclonedds.core import DDSException
        from cyclonedds.domain import Domain

        with self._lock:
            domain, xml, users = self._open.get(config.domain, (None, config.xml(), 0))
            if xml != config.xml():
                raise TransportError(f"domain {config.domain} is open on another interface than {config.interface}")
            if domain is None:
                try:
                    domain = Domain(config.domain, xml)
                except DDSException as error:
                    raise TransportError(
                        f"cannot join domain {config.domain} on {config.interface}: {error}"
                    ) from error
            self._open[config.domain] = domain, xml, users + 1

    def leave(self, number: int) -> None:
        with self._lock:
            domain, xml, users = self._open[number]
            if users > 1:
                self._open[number] = domain, xml, users - 1
            else:
                del self._open[number]
                domain.__del__()  # Cyclone's own way to delete it now, not when it is collected


_domains, _making = _Domains(), threading.Lock()


class DdsTransport:
    """See ``Transport``."""

    def __init__(self, config: DdsConfig) -> None:
        self.config = config
        self.failure: str | None = None
        self._participant: DomainParticipant | None = None
        self._readers: list[Any] = []
        self._writers: list[Any] = []
        self._publications: Any = None
        self._subscriptions: Any = None

    def open(self) -> None:
        """See ``Transport``."""
        from cyclonedds.builtin import BuiltinDataReader, BuiltinTopicDcpsPublication, BuiltinTopicDcpsSubscription
        from cyclonedds.core import DDSException
        from cyclonedds.domain import DomainParticipant

        _domains.enter(self.config)
        try:
            self._participant = DomainParticipant(self.config.domain)
            self._publications = BuiltinDataReader(self._participant, BuiltinTopicDcpsPublication)
            self._subscriptions = BuiltinDataReader(self._participant, BuiltinTopicDcpsSubscription)
        except DDSException as error:
            self._participant = None
            _domains.leave(self.config.domain)
            raise TransportError(
                f"cannot join domain {self.config.domain} on {self.config.interface}: {error}"
            ) from error

    def _joined(self) -> DomainParticipant:
        if self._participant is None:
            raise TransportError("the transport is not open")
        return self._participant

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason

    def subscribe(self, topic: Topic, on_message: OnMessage) -> None:
        """See ``Transport``."""
        from cyclonedds.core import Listener
        from cyclonedds.sub import DataReader

        fail = self._fail

        class Ears(Listener):
            def on_data_available(self, reader: Any) -> None:
                received_s = time.monotonic()
                try:
                    samples = reader.take(N=64)
                except Exception as error:  # noqa: BLE001 - another program's bytes: the decoder raises whatever they cause
                    fail(f"{topic.name}: a message that is no {topic.type}: {error!r:.100}")
                    return
                for sample in samples:
                    if hasattr(sample, "message"):  # else it only says that a publisher has gone
                        on_message(sample.message, received_s)

            def on_requested_incompatible_qos(self, reader: Any, status: Any) -> None:
                fail(_incompatible(topic, status.last_policy_id, "offers less than we ask for"))

        participant = self._joined()
        qos = _qos(topic.quality, topic.hz, writes=False)
        made = _make_topic(participant, topic)
        self._readers.append(DataReader(participant, made, qos=qos, listener=Ears()))

    def advertise(self, topic: Topic) -> DdsPublisher:
        """See ``Transport``."""
        from cyclonedds.core import Listener
        from cyclonedds.pub import DataWriter

        fail = self._fail

        class Mouth(Listener):
            def on_offered_incompatible_qos(self, writer: Any, status: Any) -> None:
                fail(_incompatible(topic, status.last_policy_id, "asks for more than we offer"))

        participant = self._joined()
        qos = _qos(topic.quality, topic.hz, writes=True)
        made = _make_topic(participant, topic)
        writer = DataWriter(participant, made, qos=qos, listener=Mouth())
        self._writers.append(writer)
        return DdsPublisher(topic, writer)

    def endpoints(self, topic: str) -> list[Endpoint] | None:
        """See ``Transport``."""
        mine, found = self._joined().guid, []
        for reader, publishes in ((self._publications, True), (self._subscriptions, False)):
            for sample in reader.read(N=1024):
                if not hasattr(sample, "topic_name") or sample.topic_name != dds_topic(topic):
                    continue
                if sample.participant_key != mine and _is_alive(sample):
                    found.append(Endpoint(publishes, topic, ros_type(sample.type_name)))
        return found

    def close(self) -> None:
        """See ``Transport``: endpoints that are merely forgotten would be seen by others for a while."""
        participant, self._participant = self._participant, None
        if participant is None:
            return
        for reader in self._readers:
            reader.set_listener(None)
        self._readers, self._writers, self._publications, self._subscriptions = [], [], None, None
        participant.__del__()  # deletes it and all that it holds, now
        _domains.leave(self.config.domain)


def _make_topic(participant: DomainParticipant, topic: Topic) -> Any:
    from cyclonedds.topic import Topic as DdsTopic

    with _making:  # two threads that make their first one at once get an error
        return DdsTopic(participant, dds_topic(topic.name), _data_type(topic.type))


def _is_alive(sample: Any) -> bool:
    from cyclonedds.core import InstanceState

    return bool(sample.sample_info.instance_state & InstanceState.Alive)


def _incompatible(topic: Topic, policy_id: int, how: str) -> str:
    names = {2: "durability", 4: "deadline", 8: "liveliness", 11: "reliability", 23: "data representation"}
    ours = {"command": "reliable, volatile, with deadline", "sensor": "best effort", "state": "reliable, volatile"}
    return (
        f"incompatible QoS on {topic.name}: the other side {how} in {names.get(policy_id, f'policy {policy_id}')}; "
        f"ours is {ours[topic.quality]} ({topic.quality})"
    )


class DdsPublisher:
    """See ``Publisher``."""

    def __init__(self, topic: Topic, writer: Any) -> None:
        self.topic = topic
        self._writer = writer
        self._sample = _data_type(topic.type)

    def publish(self, message: Message) -> None:
        """See ``Publisher``."""
        from cyclonedds.core import DDSException

        try:
            self._writer.write(self._sample(message))
        except DDSException as error:
            raise TransportError(f"{self.topic.name}: the message was not taken: {error}") from error
