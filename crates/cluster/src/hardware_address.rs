//! Hardware address of one interface as people write it (IEEE 802, six bytes).

/// Reason why a text is no hardware address of one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HardwareAddressError {
    /// Not six bytes of two hexadecimal digits with colons between them; or all of them zero, which nobody has.
    #[error("no hardware address")]
    NotOne,
    /// The lowest bit of the first byte is set: broadcast or multicast.
    #[error("the address of a group")]
    Group,
}

/// Reads `02:00:5e:00:01:01`; digits of either case, nothing around them.
///
/// # Errors
/// As [`HardwareAddressError`] says.
pub fn parse(text: &str) -> Result<[u8; 6], HardwareAddressError> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let digits = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        let part = parts.next().filter(digits).ok_or(HardwareAddressError::NotOne)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| HardwareAddressError::NotOne)?;
    }
    match bytes {
        _ if parts.next().is_some() => Err(HardwareAddressError::NotOne),
        [0, 0, 0, 0, 0, 0] => Err(HardwareAddressError::NotOne),
        [first, ..] if first & 1 == 1 => Err(HardwareAddressError::Group),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_six_bytes_of_one_interface() {
        assert_eq!(parse("02:00:5e:00:01:fF"), Ok([2, 0, 0x5e, 0, 1, 0xff]));
        let wrong = [
            "",
            "02:00:5e:00:01",
            "02:00:5e:00:01:01:02",
            "02:00:5e:00:01:01:",
            "2:00:5e:00:01:01",
            "002:0:5e:00:01:01",
            "+2:00:5e:00:01:01",
            "02:00:5e:00:01:+f",
            "02:00:5e:00:01:-1",
            " 02:00:5e:00:01:01",
            "02-00-5e-00-01-01",
            "02:00:5e:00:01:0g",
            "02:00:5e:00:01:0é",
            "00:00:00:00:00:00",
        ];
        for text in wrong {
            assert_eq!(parse(text), Err(HardwareAddressError::NotOne), "{text}");
        }
        for group in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "03:00:00:00:00:00"] {
            assert_eq!(parse(group), Err(HardwareAddressError::Group), "{group}");
        }
    }
}
